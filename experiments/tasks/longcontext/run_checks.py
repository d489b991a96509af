"""Refusals of runs that cannot read the texts of the suite."""
from experiments.errors import UsageError
from experiments.runs.saved_run import SavedRun


def check_context(saved: SavedRun, longest: int, argument: str) -> None:
    """Refuses texts that a run cannot read.

    Raises:
      UsageError: `longest` tokens, from the command line's `argument`, are past the context that the model was
        made for, or the model needs boundaries with the text.
    """
    model = saved.config.model
    if model.context_length is not None and longest > model.context_length:
        raise UsageError(f"{argument}: {longest} tokens are past config.model.context_length "
                         f"{model.context_length} of {saved.workdir}; give at most that many")
    if any(stage.chunking.router == "given" for stage in model.stages[:-1]):
        raise UsageError('a model with the router "given" reads boundaries that these texts do not have; use a '
                         "run with another config.model.stages.stage0.chunking.router")
