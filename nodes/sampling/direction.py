"""Live direction: the prompt or the stop that a client asks for while a video is made, taken before its next chunk."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ...lightforcing_core.refusal import Refusal
from ...lightforcing_core.rollout.recipe import Recipe
from ...lightforcing_core.rollout.timeline import Prompt
from ..timeline import unsuitable_prompt

MOST_TEXT = 4000  # characters of a prompt
NUMBERS = ("blend_chunks", "jump", "pin")
FIELDS = {"prompt", "switch", "stop", *NUMBERS}
_RUNS: dict[str, "Direction"] = {}  # by prompt id


def direct_run(asked: Any, prompt_id: str) -> dict[str, Any]:
    """Ask the sampler that runs in a ComfyUI prompt, see `Direction.ask`; Refusal of `prompt_id` if none does."""
    if prompt_id not in _RUNS:
        problem = f"{prompt_id!r:.80} is not being sampled: it is unknown, waits or has ended"
        raise Refusal("prompt_id", problem, "ask while Light Forcing Sampler runs")
    return _RUNS[prompt_id].ask(asked)


class Direction:
    """What clients ask of one run; of two prompts before the same chunk, the newer one is taken.

    encode: makes CONDITIONING of a text, in the thread of the run; None if the sampler has no text encoder.
    """

    def __init__(self, encode: Callable[[str], list[Any]] | None) -> None:
        self._encode = encode
        self._asked: tuple[str, dict[str, Any]] | None = None
        self._lock = threading.Lock()  # of what is asked and the chunk that it precedes
        self._recipe: Recipe
        self._next = 0  # the chunk before which a request is taken
        self.stops = False

    @contextlib.contextmanager
    def open(self, prompt_id: str, recipe: Recipe, first: int) -> Iterator[None]:
        """Take requests for a ComfyUI prompt whose run begins with chunk `first`, until the end of the block."""
        self._recipe, self._next = recipe, first
        _RUNS[prompt_id] = self
        try:
            yield
        finally:
            del _RUNS[prompt_id]

    def ask(self, asked: Any) -> dict[str, Any]:
        """Note {"prompt", "switch"?, "blend_chunks"?, "jump"?, "pin"?} or {"stop": true}; the chunk that it precedes.

        Called in a thread of the server. Raises Refusal, TypeError for another request.
        """
        with self._lock:
            if unknown := asked.keys() - FIELDS:
                raise Refusal("the request", f"has {sorted(unknown)!s:.80}", f"use {', '.join(sorted(FIELDS))}")
            if self._next == len(self._recipe.chunk_lengths()):
                raise Refusal("the run", "is at the last chunk of its video", "make a longer video")
            if asked == {"stop": True}:
                self.stops = True
                return {"chunk": self._next}
            if "stop" in asked:
                raise Refusal("stop", "comes with something else, or is not true", 'send {"stop": true} alone')
            text, how = asked.get("prompt"), {name: asked[name] for name in ("switch", *NUMBERS) if name in asked}
            if not isinstance(text, str) or not text.strip() or len(text) > MOST_TEXT:
                raise Refusal("prompt", "is no text, or too long", f"use 1 to {MOST_TEXT} characters")
            if any(type(how.get(name, 0)) is not int for name in NUMBERS):
                raise TypeError(f"{', '.join(NUMBERS)} are whole numbers")
            if self._encode is None:
                problem = "cannot be encoded, because the sampler has no text encoder"
                remedy = "connect the one that encoded `positive` to clip of Light Forcing Sampler"
                raise Refusal("prompt", problem, remedy)
            # All that can be refused before there is an embedding is refused here.
            self._recipe.with_prompt(Prompt(self._recipe.prompts[0].context, self._next, **how))
            self._asked = text, how
            return {"chunk": self._next}

    def follow(self, recipe: Recipe, index: int) -> tuple[Recipe, str]:
        """The recipe from chunk `index` on, and what has been asked for, in words; "" if nothing was."""
        with self._lock:
            self._next, asked, self._asked, said = index + 1, self._asked, None, ""
        if asked and self._encode is not None:
            text, how = asked
            try:
                conditioning = self._encode(text)
                context, extras = conditioning[0]
                parts = [{**extras, "cross_attn": context}, *conditioning[1:]]
                if reason := unsuitable_prompt("prompt", parts):
                    raise ValueError(reason)
                prompt = Prompt(context, index, **how)
                recipe = recipe.with_prompt(prompt)
                start = sum(recipe.chunk_lengths()[:index]) / 4  # 4 frames of 16 per second for each latent frame
                blend = f" over {prompt.blend_chunks} chunks" if prompt.switch == "blend" else ""
                cut = f" with jump {prompt.jump}, pin {prompt.pin}" if prompt.switch == "cut" else ""
                said = f"from chunk {index} on (timeline: start {start:g}, {prompt.switch}{blend}{cut}): {text}"
            except Exception as error:  # the video must not end for a text; a cancel is no Exception
                said = f"the prompt for chunk {index} was not taken: {error}"
        self._recipe = recipe
        return recipe, said
