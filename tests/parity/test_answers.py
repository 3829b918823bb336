"""The small model that ships, in transformers: the same answers."""

import numpy as np
import torch
import transformers as tf

from helpers import one_device
from infer.engine import Engine, Request
from infer.generate import BUNDLED
from infer.sampling import Sampling
from train.datasets.shapes import questions
from train.datasets.shapes.scenes import draw, make_scene

SCENES = 100
ASKED = (*questions.SHORT.values(), questions.reasoning, questions.detail)


def test_transformers_gives_the_same_answers():
    model = tf.LlavaNextForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    processor = tf.AutoProcessor.from_pretrained(BUNDLED)
    ours = Engine.load(BUNDLED, mesh=one_device(), dtype="float32", image_rules="transformers")
    requests = []
    for seed in range(SCENES):
        rng = np.random.default_rng((1, seed))
        scene = make_scene(rng)
        ask = ASKED[seed % len(ASKED)]
        question = (ask(rng, scene) or questions.caption(rng, scene))[0]
        requests.append(Request((question,), (draw(scene, rng),)))
    answers = dict(ours.generate(requests, Sampling(max_new_tokens=48), rows=32))
    for i, request in enumerate(requests):
        content = [{"type": "image"}, {"type": "text", "text": request.turns[0]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=prompt, images=request.images[0], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[i].prompt_tokens == inputs["input_ids"].shape[1]
        assert answers[i].token_ids == out.tolist(), request.turns
