"""The keys of foreign configuration files: which are read, which have no effect, which must have certain values.

Each kind of object has its `Keys` beside the code that reads it. A warning names every key that is in none of the three
lists, since the key may change what the model computes.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple, TypedDict

from msgspec import Meta

from llava_jax.config import Pixels, TokenId
from llava_jax.console import InputError, note, shorten

MAX_LISTED = 10  # unknown keys named in a warning

# Fields that transformers' PretrainedConfig writes, in versions 4 and 5, and that nothing here needs.
GENERAL = """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache attention_dropout pretraining_tp
""".split()
# Features that no part of a LLaVA has.
NEVER: dict[str, tuple] = {"is_encoder_decoder": (None, False), "pruned_heads": (None, {})}


class Keys(NamedTuple):
    """The known keys of an object.

    read      keys that the code reads
    ignored   keys that have no effect
    only      keys that are supported with these values only; with others the model would compute something else
    """

    read: frozenset[str]
    ignored: frozenset[str] = frozenset()
    only: Mapping[str, tuple] = {}


def check_keys(fields: dict[str, Any], *kinds: Keys, file: str = "config.json") -> None:
    """Warn of the keys of an object that none of `kinds` knows.

    Raises:
      InputError: a key has an unsupported value.
    """
    only = {key: values for kind in kinds for key, values in kind.only.items()}
    for key, values in only.items():
        if key in fields and fields[key] not in values:
            raise refuse(key, fields[key], [str(value) for value in values if value is not None], file)
    unknown = sorted(set(fields).difference(only, *(kind.read | kind.ignored for kind in kinds)))
    if unknown:
        more = f" and {len(unknown) - MAX_LISTED} more" if len(unknown) > MAX_LISTED else ""
        names = ", ".join(shorten(name, 40) for name in unknown[:MAX_LISTED])
        note(f"warning: {file}: unknown keys, which are ignored: {names}{more}")


def refuse(field: str, value: Any, known: Collection[str], file: str = "config.json") -> InputError:
    """The error for a value that is not among the `known` ones."""
    return InputError(f"{file}: {field} {shorten(repr(value))} is not supported, only {', '.join(known) or 'none'}")


# ---------------------------------------------------------------- fields of several kinds of object

Ids = TokenId | Annotated[list[TokenId], Meta(max_length=100)] | None
Grid = list[Annotated[list[Pixels], Meta(min_length=2, max_length=2)]]


def read_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """The token ids in a file's field: none, one or several."""
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def write_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    """Token ids as a file's field holds them: null, a number or a list."""
    return ids[0] if len(ids) == 1 else list(ids) or None


class QuantizedWeights(TypedDict, total=False):
    num_bits: int | None


class QuantizedGroup(TypedDict, total=False):
    weights: QuantizedWeights | None


class Quantization(TypedDict, total=False):
    quant_method: str | None
    bits: int | None
    w_bit: int | None
    load_in_4bit: bool | None
    load_in_8bit: bool | None
    config_groups: dict[str, QuantizedGroup] | None


def refuse_quantized(fields: dict[str, Any], preposition: str = "") -> None:
    """Raise an `InputError` if weights are quantized, with the method and the number of bits."""
    settings = fields.get("quantization_config")
    if not settings:
        return
    loads = {bits: settings.get(f"load_in_{bits}bit") for bits in (4, 8)}
    method = settings.get("quant_method") or ("bitsandbytes" if any(loads.values()) else "an unnamed method")
    if method == "bitsandbytes" and not any(loads.values()):
        return  # a loader wrote it without quantizing
    bits = settings.get("bits") or settings.get("w_bit") or next((b for b, load in loads.items() if load), None)
    for group in (settings.get("config_groups") or {}).values():  # compressed-tensors
        bits = bits or (group.get("weights") or {}).get("num_bits")
    raise InputError(
        f"config.json: quantization_config{preposition}: weights quantized by {shorten(str(method))}"
        f"{f' to {bits} bits' if bits else ''} are not supported; use the model's unquantized weights"
    )
