"""The process of one alternative: loads an adapter's ``Peer``, then runs what it is sent.

    python worker.py ADAPTER.py OPTIONS

It is run by path, with the Python and the packages of the alternative, and imports nothing else.
``OPTIONS`` is JSON: what ``Peer`` is made with. A line of standard input is JSON, too: rows of
token ids, or ``null`` to run the rows that came last. Each is answered with a line of JSON on
standard output; whatever else is printed goes to standard error.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time


def load(path):
    """The module in a file, under a name that no package has."""
    spec = importlib.util.spec_from_file_location("peer_adapter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions(names):
    """Of those distributions that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run(peer, rows):
    """One pass: its seconds, and the answers by name."""
    start = time.perf_counter()
    answers = peer.train(rows) if hasattr(peer, "train") else {"score": peer.scores(rows)}
    seconds = time.perf_counter() - start
    answers = {name: [float(x) for x in values] for name, values in answers.items()}
    return {"seconds": seconds, "answers": answers, "tokens": getattr(peer, "tokens", None)}


def counting(peer):
    """A hook that adds to ``peer.tokens`` what its model's input embeddings are called with."""
    model = getattr(peer, "model", None)
    if not hasattr(model, "get_input_embeddings") or hasattr(peer, "tokens"):
        return None
    peer.tokens = 0

    def count(_, args, kwargs):
        peer.tokens += next(iter((*args, *kwargs.values()))).numel()

    return model.get_input_embeddings().register_forward_pre_hook(count, with_kwargs=True)


def serve(peer, lines, answer):
    """Answer lines until there is none."""
    rows, own = [], hasattr(peer, "tokens")
    for line in lines:
        sent = json.loads(line)
        if sent is not None:  # an untimed pass, in which tokens are counted
            rows = sent
            if not own and hasattr(peer, "tokens"):
                del peer.tokens
            hook = counting(peer)
            found = run(peer, rows)
            if hook:
                hook.remove()
        else:
            found = run(peer, rows)
        answer(**found)


def main(path, options):
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values):
        print(json.dumps(values), file=pipe, flush=True)

    try:
        module = load(path)
        peer = module.Peer(**json.loads(options))
    except (ImportError, NotImplementedError) as reason:
        return answer(skipped=str(reason))
    names = [pin.split("==")[0] for pin in getattr(module, "PINS", [])]
    answer(versions=versions(["torch", "transformers", *getattr(module, "SHOWS", names)]))
    return serve(peer, sys.stdin, answer)


if __name__ == "__main__":
    del sys.path[0]  # files beside this one would stand in front of packages of their names
    main(*sys.argv[1:])
