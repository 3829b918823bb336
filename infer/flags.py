"""Flags that commands share: those that select a model, and the engine that they load; sampling options."""

import argparse
import dataclasses

from infer.sampling import BIAS, MAX_STOPS, TOKEN_ID, Sampling
from llava_jax.config import IMAGE_RULES
from llava_jax.console import enable_compilation_cache, integer, note, ranges, shorten
from llava_jax.data.buckets import MAX_SLOTS
from llava_jax.data.templates import explain_template


def add_model_flags(parser: argparse.ArgumentParser, default: str = "") -> None:
    """Add the flags of a model. `default` describes the model used without `--checkpoint`; "" makes that required."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint", required=not default, metavar="DIR",
        help="an Orbax directory from `python -m convert`, a directory of safetensors (original or transformers), "
        "or a hub name" + (default and f"; default: {default}"),
    )  # fmt: skip
    model.add_argument("--vision-tower", metavar="DIR", help="CLIP directory, for original checkpoints without it")
    model.add_argument("--template", metavar="NAME", help="conversation template; default: the checkpoint's own")
    model.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 on CPUs, else bfloat16")
    add_cache_flag(model)
    model.add_argument(
        "--mesh",
        metavar="AXES",
        help="for example data=1,fsdp=1,tensor=4; default: tensor as far as it divides the key/value heads, then fsdp",
    )
    model.add_argument(
        "--image-rules",
        choices=IMAGE_RULES,
        help="preprocessing where original and transformers differ; default: original",
    )


def add_cache_flag(parser) -> None:
    parser.add_argument(
        "--int8-cache", action="store_true", help="quantize the KV cache to half of bfloat16's size; answers may change"
    )


def add_batch_size_flag(parser, default: int) -> None:
    limit = MAX_SLOTS
    parser.add_argument(
        "--batch-size", type=integer(1, limit), default=default, metavar="N",
        help=f"questions at a time, at most {limit} (default {default})",
    )  # fmt: skip


def add_sampling_flags(parser, *, logprobs: bool = True) -> None:
    """Add a flag for each field of `Sampling` but `stop_token_ids`.

    Args:
      parser: a parser or a group of one.
      logprobs: whether the command can show log probabilities.
    """
    limits = ranges(Sampling)

    def add(name: str, metavar: str, about: str) -> None:
        field = name.removeprefix("--").replace("-", "_")
        parser.add_argument(name, type=limits[field], default=getattr(Sampling, field), metavar=metavar, help=about)

    add("--max-new-tokens", "N", "(default 512)")
    add("--min-new-tokens", "N", "answer with at least this many (default 0)")
    add("--temperature", "X", "0, the default, is greedy")
    add("--top-p", "P", "above 0 (default 1, off)")
    add("--top-k", "K", "(default 0, off)")
    add("--min-p", "P", "least probability of a token, relative to the most likely one's (default 0, off)")
    add("--seed", "N", "(default 0)")
    add("--repetition-penalty", "X", "divide logits of tokens of the prompt and the answer (default 1, off)")
    add("--presence-penalty", "X", "subtract from the logits of the answer's tokens (default 0, off)")
    add("--frequency-penalty", "X", "the same, times how often they occur in it (default 0, off)")
    parser.add_argument(
        "--logit-bias", type=logit_bias, action="append", default=[], metavar="ID=BIAS",
        help=f"add a number from {BIAS.minimum} to {BIAS.maximum} to the logit of a token; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help=f"end the answer before this text; repeatable, at most {MAX_STOPS} times",
    )  # fmt: skip
    parser.add_argument("--ignore-eos", action="store_true", help="do not end the answer at an end token")
    if not logprobs:
        return
    parser.add_argument(
        "--logprobs", type=limits["top_logprobs"], metavar="N",
        help="with --json, the log probabilities of each token and of the N most likely ones",
    )  # fmt: skip


def logit_bias(text: str) -> tuple[int, float]:
    """Parse `ID=BIAS`.

    Raises:
      argparse.ArgumentTypeError: it is not a token id and a number in range.
    """
    token, equals, bias = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r}: must be ID=BIAS, a token id and a number")
    return int(TOKEN_ID(token)), BIAS(bias)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling options that the flags select.

    Raises:
      InputError: they contradict each other.
    """
    named = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling) if hasattr(args, f.name)}
    return Sampling(**named, top_logprobs=getattr(args, "logprobs", None))


def load_engine(args: argparse.Namespace):
    """Load the `infer.engine.Engine` that the flags select. Logs its template and devices, and warns if
    `--max-new-tokens` exceeds the model's context.

    Raises:
      InputError: as `Engine.load`.
    """
    enable_compilation_cache()
    from infer.engine import Engine  # slow, and not needed for --help and invalid flags
    from llava_jax.sharding.mesh import format_mesh

    engine = Engine.load(
        args.checkpoint,
        mesh=args.mesh,
        dtype=args.dtype,
        int8_cache=args.int8_cache,
        template=args.template,
        vision_tower=args.vision_tower,
        image_rules=args.image_rules,
    )
    template, mesh = explain_template(engine.config, args.template), format_mesh(engine.mesh.shape)
    note(f"template {template}; {engine.mesh.devices.flat[0].device_kind}, mesh {mesh}")
    if "max_new_tokens" in args and args.max_new_tokens > engine.context:
        note(
            f"warning: --max-new-tokens {args.max_new_tokens}: the model's context has {engine.context} positions, "
            "including the prompt; answers end there"
        )
    return engine
