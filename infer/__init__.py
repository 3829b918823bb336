"""Inference with LLaVA: `python -m infer.generate`, and from Python:

from infer import load
model = load("llava-v1.5-7b")
print(model.ask("What is in this image?", ["photo.jpg"]).text)
"""


def load(checkpoint, **options):
    """Load a checkpoint as an `infer.engine.Engine`; see `Engine.load` for the options."""
    from infer.engine import Engine

    return Engine.load(checkpoint, **options)
