"""lm-evaluation-harness with a bounded state: python -m jaxcompress.lm_eval, with the flags of lm_eval.

    python -m jaxcompress.lm_eval --model jaxcompress --model_args pretrained=DIR,policy=tova,slots=256 --tasks TASK

The harness finds a model of another package only once it is registered in its process, and has no hook for that. So
this module registers `jaxcompress` and then runs the harness's own command line. From Python, call `register` before
`lm_eval.simple_evaluate(model="jaxcompress", ...)`.
"""

from __future__ import annotations

import sys

from jaxcompress._extras import MissingExtra, extra

NAME = "jaxcompress"


def register() -> None:
    """Makes the harness know the model. Raises MissingExtra if the harness is not installed."""
    with extra("lm-eval"):
        from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="jaxcompress.evaluation.harness:HarnessModel")


def main() -> int:
    """Runs the harness's command line; returns the exit code."""
    try:
        register()
    except MissingExtra as error:
        print(f"jaxcompress: {error}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
