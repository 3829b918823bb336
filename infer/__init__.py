"""Inference with LLaVA: `python -m infer.generate`, and from Python:

from infer import load
model = load("llava-v1.5-7b")
print(model.ask("What is in this picture?", ["photo.jpg"]).text)
"""


def load(checkpoint, **options):
    """An `infer.engine.Engine` for a checkpoint; see `Engine.load` for the options."""
    from infer.engine import Engine

    return Engine.load(checkpoint, **options)
