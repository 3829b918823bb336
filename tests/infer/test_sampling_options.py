"""Sampling options and their flags: ranges, what they become, and errors."""

import dataclasses
import math

import numpy as np
import pytest

from infer import generate
from infer.flags import add_sampling_flags, sampling_of
from infer.next_token import Controls
from infer.sampling import Sampling
from llava_jax.console import InputError, Parser

INVALID = [
    (dict(temperature=-1), "--temperature -1: must be a number from 0 to 1000"),
    (dict(temperature=math.nan), "--temperature nan: must be a number from 0 to 1000"),
    (dict(top_p=0), "--top-p 0: must be a number above 0, at most 1"),
    (dict(top_p=1.1), "--top-p 1.1: must be a number above 0, at most 1"),
    (dict(top_k=-1), "--top-k -1: must be a whole number from 0 to 2147483647"),
    (dict(min_p=1.1), "--min-p 1.1: must be a number from 0 to 1"),
    (dict(seed=-1), "--seed -1: must be a whole number from 0 to 2147483647"),
    (dict(max_new_tokens=0), "--max-new-tokens 0: must be a whole number from 1 to 2147483647"),
    (dict(min_new_tokens=9, max_new_tokens=8), "--min-new-tokens 9: must be at most --max-new-tokens, 8"),
    (dict(repetition_penalty=0), "--repetition-penalty 0: must be a number above 0, at most 1000"),
    (dict(presence_penalty=2.1), "--presence-penalty 2.1: must be a number from -2 to 2"),
    (dict(frequency_penalty=-2.1), "--frequency-penalty -2.1: must be a number from -2 to 2"),
    (dict(top_logprobs=21), "--top-logprobs 21: must be a whole number from 0 to 20"),
    (dict(top_logprobs=True), "--top-logprobs True: must be a whole number from 0 to 20"),
    (dict(ignore_eos=1), "--ignore-eos 1: must be true or false"),
    (dict(logit_bias={-1: 1}), "--logit-bias: the token id -1: must be a whole number from 0 to 2147483647"),
    (dict(logit_bias={"5": 1}), "--logit-bias: the token id '5': must be a whole number from 0 to 2147483647"),
    (dict(logit_bias={5: 101}), "--logit-bias: the bias of token 5, 101: must be a number from -100 to 100"),
    (dict(logit_bias={5: math.nan}), "--logit-bias: the bias of token 5, nan: must be a number from -100 to 100"),
    (dict(logit_bias=[(5, 1), (5, 2)]), "--logit-bias: token 5 is given twice"),
    (dict(logit_bias=[5]), "--logit-bias 5: must be a token id and a number"),
    (dict(logit_bias=["51"]), "--logit-bias '51': must be a token id and a number"),
    (dict(logit_bias=5), "--logit-bias 5: must be a list"),
    (dict(logit_bias="51"), "--logit-bias '51': must be a list"),
    (dict(logit_bias=dict.fromkeys(range(301), 1)), "--logit-bias: has 301 pairs; at most 300 are supported"),
    (dict(stop=""), "--stop '': must be a string of 1 to 1,000 characters"),
    (dict(stop=["a", ""]), "--stop '': must be a string of 1 to 1,000 characters"),
    (dict(stop=[b"a"]), "--stop b'a': must be a string of 1 to 1,000 characters"),
    (dict(stop=["x" * 1001]), f"--stop '{'x' * 63}...{'x' * 32}': must be a string of 1 to 1,000 characters"),
    (dict(stop=["x"] * 17), "--stop: has 17 strings; at most 16 are supported"),
    (dict(stop=7), "--stop 7: must be a list"),
    (dict(stop_token_ids=[2, -1]), "--stop-token-ids: the token id -1: must be a whole number from 0 to 2147483647"),
    (dict(stop_token_ids=[2.0]), "--stop-token-ids: the token id 2.0: must be a whole number from 0 to 2147483647"),
]


@pytest.mark.parametrize(("settings", "says"), INVALID, ids=[says[:40] for _, says in INVALID])
def test_options_out_of_range(settings, says):
    with pytest.raises(InputError) as error:
        Sampling(**settings)
    assert str(error.value) == says


def test_lists_and_mappings_become_tuples():
    sampling = Sampling(logit_bias={np.int64(5): 1, 7: -2.5}, stop=["\n", "###"], stop_token_ids=[2])
    assert (sampling.logit_bias, sampling.stop, sampling.stop_token_ids) == (((5, 1.0), (7, -2.5)), ("\n", "###"), (2,))
    assert sampling == Sampling(**dataclasses.asdict(sampling))
    assert hash(sampling) == hash(dataclasses.replace(sampling))
    assert Sampling(stop="###").stop == ("###",)


def test_arrays_for_the_device():
    sampling = Sampling(temperature=0.5, top_k=3, min_new_tokens=4, logit_bias={2: 1.5, 0: -100})
    params = sampling.params()
    assert set(params) == set(Controls._fields)
    assert {name: value.dtype.name for name, value in params.items()} == {
        **dict.fromkeys(Controls._fields, "float32"), "top_k": "int32", "min_new_tokens": "int32",
    }  # fmt: skip
    assert all(value == getattr(sampling, name) for name, value in params.items())
    controls = Controls.of([Sampling(), sampling])
    assert (controls.top_k.tolist(), controls.temperature.dtype) == ([0, 3], np.float32)
    assert sampling.bias_row(4).tolist() == [-100, 0, 1.5, 0]
    with pytest.raises(InputError, match="^--logit-bias: the token id 2: must be a whole number from 0 to 1$"):
        sampling.bias_row(2)


def parse(*given: str) -> Sampling:
    parser = Parser(prog="test")
    add_sampling_flags(parser.add_argument_group("answers"))
    return sampling_of(parser.parse_args(given))


def test_flags_select_every_option():
    assert parse() == Sampling()
    given = (
        "--temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --seed 3 --max-new-tokens 20 --min-new-tokens 2 "
        "--repetition-penalty 1.1 --presence-penalty -0.5 --frequency-penalty 0.25 --logit-bias 5=-1.5 "
        "--logit-bias 0=3 --stop ### --ignore-eos --logprobs 0"
    )
    sampling = parse(*given.split(), "--stop", "\n")
    assert sampling == Sampling(
        0.5, 7, 0.9, 3, 20, min_p=0.1, min_new_tokens=2, repetition_penalty=1.1, presence_penalty=-0.5,
        frequency_penalty=0.25, logit_bias=((5, -1.5), (0, 3.0)), stop=("###", "\n"), ignore_eos=True, top_logprobs=0,
    )  # fmt: skip
    defaults = Sampling()
    unset = {f.name for f in dataclasses.fields(Sampling) if getattr(sampling, f.name) == getattr(defaults, f.name)}
    assert unset == {"stop_token_ids"}  # which has no flag


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--logit-bias", "5"], "--logit-bias '5': must be ID=BIAS, a token id and a number"),
        (["--logit-bias", "x=1"], "--logit-bias 'x': must be a whole number from 0 to 2147483647"),
        (["--logit-bias", "1=500"], "--logit-bias 500: must be a number from -100 to 100"),
        (["--logit-bias", "1=2", "--logit-bias", "1=2"], "--logit-bias: token 1 is given twice"),
        (["--stop", ""], "--stop '': must be a string of 1 to 1,000 characters"),
        (["--logprobs", "21"], "--logprobs 21: must be a whole number from 0 to 20"),
        (["--min-new-tokens", "513"], "--min-new-tokens 513: must be at most --max-new-tokens, 512"),
    ],
)
def test_invalid_flags(given, says):
    with pytest.raises(InputError) as error:
        parse(*given)
    assert str(error.value) == says


@pytest.mark.parametrize(
    "more", [["--prompt", "Hi"], ["--questions", "q.jsonl", "--answers", "a.jsonl", "--json"]], ids=" ".join
)
def test_log_probabilities_are_printed_as_json(run_cli, more):
    status, out, err = run_cli(generate.main, "--checkpoint", "none", "--logprobs", 3, *more)
    assert (status, out, err) == (1, "", "error: --logprobs needs --prompt and --json\n")
