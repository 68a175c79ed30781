"""Run by Python as it starts, under ``rmfast run``: once a program has transformers, it patches."""

import importlib
import os
import sys

_OPTIONS = os.environ.get("RMFAST_EVERYWHERE")


class _Watch:
    """Finds the module of transformers' models as others do, and begins when it has been run."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.modeling_utils":
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), _begin())
        return spec


def _begin():
    import json

    try:
        from rmfast.integrations.everywhere import everywhere

        everywhere(**json.loads(_OPTIONS)).__enter__()
    except (ImportError, ValueError) as error:
        print(f"rmfast: nothing is patched: {error}", file=sys.stderr)


if _OPTIONS is not None:
    sys.meta_path.insert(0, _Watch())
here = os.path.dirname(__file__)
sys.path[:] = [folder for folder in sys.path if folder != here]
del sys.modules[__name__]
importlib.import_module(__name__)  # another's; Python passes over the error where there is none
