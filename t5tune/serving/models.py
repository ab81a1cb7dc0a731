"""A model as clients see it: its name, and how their requests become prompts and replies."""

import time
from dataclasses import dataclass, field

from t5tune.errors import SettingsError
from t5tune.model.generation import MIN_TEMPERATURE
from t5tune.model.prompts import Prompt, Prompts
from t5tune.serving.generation import DecodingOptions, Engine
from t5tune.serving.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest


@dataclass(frozen=True)
class ServedModel:
    """A model that is loaded.

    Args:
        defaults: what a request that says nothing gets.
        longest: the most tokens of a reply that a request may ask for.
    """

    name: str
    engine: Engine
    prompts: Prompts
    defaults: DecodingOptions
    longest: int
    created: int = field(default_factory=lambda: int(time.time()))

    def read_prompts(self, request: GenerationRequest) -> list[Prompt]:
        """Encode what a request asks to reply to.

        Raises:
            ApiError: it can't be replied to, or is too long.
        """
        try:
            if isinstance(request, ChatRequest):
                system, turns = request.split_messages()
                return [self._check_prompt(self.prompts.encode(turns, system), "messages")]
            assert isinstance(request, CompletionRequest)
            return [self._read_prompt(prompt) for prompt in request.prompt]
        except SettingsError as error:
            raise ApiError(400, str(error), error.message.partition(":")[0]) from error

    def read_options(self, request: GenerationRequest) -> DecodingOptions:
        """Complete what a request says about decoding.

        Raises:
            ApiError: it asks for more than is allowed, or for what the engine can't do.
        """
        name, limit = request.reply_limit
        if limit is not None and limit > self.longest:
            problem = f"{name}: {limit}: this server allows at most {self.longest:,} tokens"
            raise ApiError(400, problem, name)
        temperature = self.defaults.temperature if request.temperature is None else request.temperature
        if request.seed is not None and temperature > 0 and not self.engine.has_seeds:
            problem = f"seed: {request.seed}: {self.engine.name} can't repeat a sampled reply"
            raise ApiError(400, f"{problem}; leave it out, or set temperature to 0", "seed", "unsupported")
        return DecodingOptions(
            max_new_tokens=self.defaults.max_new_tokens if limit is None else limit,
            temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
            top_p=self.defaults.top_p if request.top_p is None else request.top_p,
            seed=request.seed,
        )

    def _read_prompt(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return self._check_prompt(self.prompts.encode_text(prompt), "prompt")
        size = len(self.prompts.tokenizer)
        unknown = next((index for index in prompt if not 0 <= index < size), None)
        if unknown is not None:
            raise ApiError(400, f"prompt: {unknown}: the tokenizer has no such id; it has {size:,} tokens", "prompt")
        return self._check_prompt(self.prompts.make_prompt(prompt), "prompt")

    def _check_prompt(self, prompt: Prompt, param: str) -> Prompt:
        if not self.engine.can_read(prompt.ids):
            problem = f"{param}: nothing to reply to: {self.engine.name} needs at least one token that isn't special"
            raise ApiError(400, problem, param)
        if prompt.cut_tokens:
            limit = f"model_max_length is {self.prompts.max_length:,} tokens"
            what = "the system and the last message don't fit" if param == "messages" else f"it has {len(prompt.ids):,}"
            raise ApiError(400, f"{param}: too long: {what}; {limit}", param, "context_length_exceeded")
        return prompt
