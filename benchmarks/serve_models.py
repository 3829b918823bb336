"""The models that `serve.py` serves: the bundled one, and random weights with all files that a server needs."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import devices
from serve_load import ROOT

BUNDLED = ROOT / "infer" / "shapes"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to serve: its directory, the side of its tiles, and positions of a slot."""

    name: str
    directory: Path
    side: int
    context: int


def find_model(name: str, scratch: Path, dtype: str) -> Model:
    """The bundled model, or one of random weights, created in `scratch` if missing."""
    if name == "shapes":
        return Model(name, BUNDLED, 60, 2048)
    directory = scratch / name
    if not (directory / "config.json").exists():
        from generate import make_weights

        maker = multiprocessing.get_context("spawn").Process(target=make_weights, args=(name, directory, dtype))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("no weights were made")
        write_processor(directory)
    return Model(name, directory, devices.model_config(name).vision.image_size, 4096)


def write_processor(directory: Path) -> None:
    """Write the tokenizer, the chat template and the image processor of a random model: those of the bundled one, with
    a word for each further token id."""
    config = json.loads((directory / "config.json").read_text())
    image, vision = config["image_token_index"], config["vision_config"]
    files = {path.name: json.loads(path.read_text()) for path in BUNDLED.glob("*.json")}
    moved = {640: image, 641: image + 1}  # the ids of the image and padding tokens
    tokenizer, settings = files["tokenizer.json"], files["tokenizer_config.json"]
    tokenizer["model"]["vocab"] |= {f"\u2581w{i}": i for i in range(640, image)}
    for token in tokenizer["added_tokens"]:
        token["id"] = moved.get(token["id"], token["id"])
    settings["added_tokens_decoder"] = {
        str(moved.get(int(i), i)): token for i, token in settings["added_tokens_decoder"].items()
    }
    processor, images = files["processor_config.json"], files["preprocessor_config.json"]
    processor["patch_size"], side = vision["patch_size"], vision["image_size"]
    images |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    config["conversation_template"] = files["config.json"]["conversation_template"]
    for name, value in (
        ("tokenizer.json", tokenizer), ("tokenizer_config.json", settings), ("processor_config.json", processor),
        ("preprocessor_config.json", images), ("config.json", config),
    ):  # fmt: skip
        (directory / name).write_text(json.dumps(value, indent=2))
    (directory / "chat_template.jinja").write_text((BUNDLED / "chat_template.jinja").read_text())


def write_decoder(model: Model, directory: Path, dtype: str) -> None:
    """Write the decoder of a model as a model of its own, with transformers."""
    import torch
    import transformers as tf

    whole = tf.LlavaNextForConditionalGeneration.from_pretrained(model.directory, dtype=getattr(torch, dtype))
    decoder = tf.AutoModelForCausalLM.from_config(whole.config.text_config, dtype=getattr(torch, dtype))
    decoder.model.load_state_dict(whole.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(whole.lm_head.state_dict())
    decoder.generation_config = whole.generation_config
    decoder.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text((model.directory / name).read_text())
