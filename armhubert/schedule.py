"""The learning rate over a run."""


def learning_rate(step: int, steps: int, rising: float, peak: float) -> float:
    """Rate of step 0..steps-1: linear rise to `peak` over the first `rising` steps, then linear fall to 0."""
    rising = max(1.0, rising)
    if step + 1 < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / (steps - rising + 1)
