"""The commands whose options are all on the command line: demo, score, eval and doctor."""

from __future__ import annotations

from typing import Any

import typer

from rmfast.commands.arguments import command
from rmfast.demo.options import DemoOptions
from rmfast.diagnosis.options import DoctorOptions
from rmfast.evaluate.options import EvalOptions
from rmfast.score.options import ScoreOptions

_DEMO = """Train a reward model, and hold its scores and its speed against Hugging Face's.

Trains it on preference pairs, scores held-out ones with the patch and without, and times both.
Nothing is downloaded: the model comes from a package, the pairs are from Python's own
documentation, and a few minutes on two CPU cores are enough. Your own model and data go to rmfast
train, doctor, which checks a model, and bench, which times it beside Hugging Face.
"""
_SCORE = """Score a file of conversations with a reward model.

Scores each row of a file and writes it again with its reward. Rows are messages, prompt +
responses (completions), prompt + response (completion), chosen + rejected (prompt or not), or text,
whichever comes first in this order; all their columns are kept. The output has the input's order,
and is on the disk window by window: after a kill, the same command with --resume continues, and the
output is the same as if nothing had happened.
"""
_SCORE_EPILOG = (
    "Rows that cannot be scored are left out and listed in OUTPUT.errors.jsonl by line and reason. "
    "Exit code: 0, all rows scored; 1, some were not; 2, it could not run, or --strict met a bad "
    "row; 130, interrupted."
)
_EVAL = """Measure a reward model on preference data.

Prints its accuracy on pairs of chosen and rejected answers, by subset and with its interval;
margins, length bias and calibration. Where rows have lists of answers, how often the best one is a
chosen one; where these are three and three, RM-Bench's figures too. The rows of RewardBench,
RewardBench 2, RM-Bench and JudgeBench get their published figure first. chosen and rejected are
text, messages, or lists of these; prompt is optional.
"""
_EVAL_EPILOG = (
    "Exit code: 0, all rows scored; 1, some were not; 2, it could not run, or --strict met a bad "
    "row; 130, interrupted. All options may be written with _ for -, as RewardBench has them."
)
_DOCTOR = """Check a reward model for what would give wrong scores.

Looks at the model, its checkpoint and its tokenizer, scores a few built-in conversations with and
without the patch, and says what to do.
"""
_DOCTOR_EPILOG = (
    "Exit code: 0, nothing gives wrong scores; 1, something does; 2, the model does not load."
)


def add(app: typer.Typer) -> None:
    command(app, "demo", DemoOptions, _demo, _DEMO)
    command(app, "score", ScoreOptions, _score, _SCORE, _SCORE_EPILOG)
    command(app, "eval", EvalOptions, _eval, _EVAL, _EVAL_EPILOG)
    command(app, "doctor", DoctorOptions, _doctor, _DOCTOR, _DOCTOR_EPILOG)


def _demo(options: DemoOptions) -> int:
    from rmfast.demo import demo

    return demo.run(options)


def _score(options: ScoreOptions) -> int:
    from rmfast.score import job

    return job.run(options, job.load_scorer if options.ray is None else _on_ray)


def _on_ray(options: ScoreOptions, settings: dict[str, Any]) -> Any:
    from rmfast.integrations.ray import RayScorer

    load = options.for_loading()
    return RayScorer(options.model, actors=options.ray, load=load, **settings)


def _eval(options: EvalOptions) -> int:
    from rmfast.evaluate import job

    return job.run(options)


def _doctor(options: DoctorOptions) -> int:
    from rmfast.diagnosis import doctor

    return doctor.run(options)
