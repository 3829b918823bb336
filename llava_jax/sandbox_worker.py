"""The process that `sandbox.Worker` starts: reads tasks as lines of JSON, and writes an answer line for each.

Tasks import what they need, but neither JAX nor transformers, so that the process starts in 0.1 s.
"""

import contextlib
import functools
import json
import re
import resource
import signal
import sys
from datetime import datetime
from typing import Any

MAX_ADDED_CHARS = 2**20  # characters of a chat template's output beyond its input
_tokenizer: Any = None  # a `tokenizers.Tokenizer`


def match(pattern: str, names: list[str]) -> list[bool]:
    """Which names a PEFT pattern matches: a regular expression for the end of a module's name."""
    compiled = re.compile(rf"(.*\.)?({pattern})$")
    return [compiled.match(name) is not None for name in names]


# ---------------------------------------------------------------- chat templates


def render(program: str, messages: list[dict], add_generation_prompt: bool) -> str:
    """Render a conversation as transformers' `render_jinja_template` does."""
    given = dict(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt)
    text = _compile(program).render(given)
    text.encode()  # raises on an unpaired surrogate
    if len(text) > MAX_ADDED_CHARS + len(json.dumps(messages)):
        raise ValueError(f"renders {len(text):,} characters")
    return text


@functools.lru_cache(maxsize=4)
def _compile(program: str):
    """Compile a template in transformers' environment (utils/chat_template_utils.py)."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks the model's text: renders its contents in a new scope."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("contents"), [], [], body, lineno=line)

        def contents(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that begin with an underscore, which are special in Python."""

        def __init__(self, /, *args, **kwargs):
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise jinja2.sandbox.SecurityError(f"a namespace cannot have {name}")
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "namespace": Namespace,
    }
    return environment.from_string(program)


# ---------------------------------------------------------------- tokenizers


def load(tokenizer_json: str) -> None:
    """Load the tokenizer that `encode` and `decode` use."""
    import tokenizers

    global _tokenizer
    _tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)


def encode(text: str, add_special_tokens: bool) -> dict[str, Any]:
    found = _tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return {key: getattr(found, key) for key in ("ids", "offsets", "tokens", "special_tokens_mask")}


def decode(ids: list[int], skip_special_tokens: bool) -> str:
    return _tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


TASKS = {task.__name__: task for task in (match, render, load, encode, decode)}


def answer(task: str, args: list) -> bytes:
    try:
        return json.dumps({"value": TASKS[task](*args)}).encode()
    except MemoryError:
        return b'{"memory": true}'
    except BaseException as error:  # including Rust panics, which are no `Exception`
        return json.dumps({"error": (str(error) or type(error).__name__)[:1000]}).encode()


def main(memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C and ends this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump when a limit is exceeded
    with contextlib.suppress(ValueError, OSError):  # the system does not support this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin.buffer:
        task, seconds, args = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        sys.stdout.buffer.write(answer(task, args) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
