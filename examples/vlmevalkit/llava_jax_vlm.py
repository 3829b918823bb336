"""The engine as a model of VLMEvalKit, in its own process.

    LLAVA_JAX_CHECKPOINT=DIR python examples/vlmevalkit/llava_jax_vlm.py VLMEvalKit/run.py \
        --data MMBench_DEV_EN POPE --model llava_jax --work-dir out

runs VLMEvalKit's `run.py` with `llava_jax` among its models.
"""

import functools
import os
import runpy
import string
import sys
from collections.abc import Sequence
from typing import Any

from vlmeval.dataset import DATASET_TYPE
from vlmeval.smp import cn_string
from vlmeval.vlm.base import BaseModel

from infer.engine import Engine
from infer.prompt import Request, turn_of
from infer.sampling import Sampling
from llava_jax.console import InputError, enable_compilation_cache
from llava_jax.data.templates import IMAGE_PART

MAX_NEW_TOKENS = 2048  # as of VLMEvalKit's own LLaVA
CHOOSE, CHOOSE_CHINESE = "Answer with the option's letter from the given choices directly.", "请直接回答选项字母。"
ANSWER, ANSWER_CHINESE = "Answer the question directly.", "请直接回答问题。"

Part = dict[str, str]  # {"type": "text" or "image", "value": a text or the path of a file}


class LlavaJax(BaseModel):
    """A LLaVA checkpoint that VLMEvalKit asks. It answers greedily, one question after another.

    Video is refused by `BaseModel.generate`, by `allowed_types`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(self, checkpoint: str, *, max_new_tokens: int = MAX_NEW_TOKENS, **engine):
        """Load a checkpoint; `engine` are further arguments of `Engine.load`.

        Raises:
          InputError: an argument is invalid.
        """
        super().__init__()
        enable_compilation_cache()
        self.engine = Engine.load(checkpoint, **engine)
        self.sampling = Sampling(max_new_tokens=max_new_tokens)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Multiple-choice questions are asked as LLaVA was trained; other datasets have prompts of their own."""
        return DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[Part]:
        """A row of a multiple-choice dataset as a prompt (vlmeval/vlm/llava/llava.py `LLaVA.build_prompt`)."""
        cells = {key: line[key] for key in ("hint", "question", *string.ascii_uppercase) if key in line}
        filled = {key: value for key, value in cells.items() if value == value}  # an empty cell is NaN
        options = [f"{key}. {value}" for key, value in filled.items() if len(key) == 1]
        lines = [str(filled[key]) for key in ("hint", "question") if key in filled]
        text = "\n".join([*lines, *options])
        chinese, english = (CHOOSE_CHINESE, CHOOSE) if options else (ANSWER_CHINESE, ANSWER)
        images = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*images, {"type": "text", "value": f"{text}\n{chinese if cn_string(text) else english}"}]

    def generate_inner(self, message: Sequence[Part], dataset: str | None = None) -> str:
        """Answer a question of texts and images, in their order."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer the last question of a conversation: {"role": "user" or "assistant", "content": parts}, ...

        Raises:
          InputError: it cannot be asked: an image cannot be read, or it does not fit the context.
        """
        turns, images = [], []
        for utterance in message:
            parts = utterance["content"]
            images += [part["value"] for part in parts if part["type"] == "image"]
            turns.append(turn_of([IMAGE_PART if part["type"] == "image" else part["value"] for part in parts]))
        request = Request(tuple(turns), tuple(images), trust_special_tokens=False)
        ((_, answer),) = self.engine.generate([request], self.sampling, rows=1)
        if isinstance(answer, InputError):
            raise answer
        return answer.text


def main() -> None:
    from vlmeval.config import supported_VLM

    if len(sys.argv) < 2 or "LLAVA_JAX_CHECKPOINT" not in os.environ:
        raise SystemExit("usage: LLAVA_JAX_CHECKPOINT=DIR python llava_jax_vlm.py VLMEvalKit/run.py --data ... ")
    supported_VLM["llava_jax"] = functools.partial(LlavaJax, os.environ["LLAVA_JAX_CHECKPOINT"])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
