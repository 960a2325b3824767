"""Where a denoising run stands: step, guidance branch and token grid, read without touching the pipeline's loop.

One :class:`Run` belongs to a pipeline and is shared by its transformers; one :class:`ModelContext` hooks each
transformer's forward. Nothing here counts attention calls, because feature caches skip them.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from dsattn.engine import Engine
from dsattn.grid import Call, VideoGrid
from dsattn.pipelines import custom_op
from dsattn.pipelines.family import Family, Size, grid_from_coords

_HOOK = "dsattn"


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to reset."""


class Carrier(ModelHook):
    """Receives what pipelines announce: the cache context of a call, and the end of a run.

    diffusers delivers both to every stateful hook in a module's registry. The carrier sits at the front of the
    registry and leaves ``forward`` alone: hooks that wrap ``forward`` are lost when model offload is set up after
    them, and a deep copy of such a module would run the original's weights.
    """

    _is_stateful = True

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.manager = StateManager(_NoState)
        self.made_registry = False

    def reset_state(self, module: nn.Module) -> nn.Module:
        """End of a run, announced by ``pipe.maybe_free_model_hooks()``."""
        self.run.ended = True
        return module

    @property
    def announced(self) -> Any:
        """The ``CacheContext`` of the current call, or None."""
        return self.manager._context

    def attach(self, module: nn.Module) -> None:
        """Put the carrier in front of the module's hook registry."""
        self.made_registry = not hasattr(module, "_diffusers_hook")
        registry = HookRegistry.check_if_exists_or_initialize(module)
        forward = module.__dict__.get("forward")
        registry.register_hook(self, _HOOK)
        if forward is None:
            del module.__dict__["forward"]
        else:
            module.forward = forward
        for parallel in (registry._hook_order, registry._fn_refs):
            parallel.insert(0, parallel.pop())

    def detach(self, module: nn.Module) -> None:
        """Take the carrier out; a registry made for it goes too unless others use it by now."""
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None or registry.hooks.get(_HOOK) is not self:
            return
        position = registry._hook_order.index(_HOOK)
        registry._hook_order.pop(position)
        registry._fn_refs.pop(position)
        del registry.hooks[_HOOK]
        if self.made_registry and not registry.hooks:
            del module._diffusers_hook


class Run:
    """Step counter of one pipeline, over all its transformers.

    Args:
        engine: told about the start of every run.
        pipeline: read for its scheduler and step count; None when only a transformer is known.

    """

    def __init__(self, engine: Engine, pipeline: Any = None) -> None:
        self.engine = engine
        self.pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self.ended = True
        self.step = 0
        self.num_steps: int | None = None
        self.call = 0
        self._size: Size | None = None
        self._marker: tuple[Any, ...] = ()
        self._direction = 0
        self._timesteps: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        pipeline = self.pipeline() if self.pipeline is not None else None
        new = memo[id(self)] = Run(copy.deepcopy(self.engine, memo), memo.get(id(pipeline)))
        return new

    def begin(self, announced: Any, timestep: Any, size: Size) -> bool:
        """Account for one forward pass: which step it belongs to; True if a new run starts with it.

        The step comes from what the pipeline announces; else from the scheduler's step index and the pipeline's
        current timestep, which are host objects; only without any of them from the value of the timestep, which
        costs one device synchronisation per forward pass.
        """
        pipeline = self.pipeline() if self.pipeline is not None else None
        scheduler = getattr(pipeline, "scheduler", None)
        explicit = getattr(announced, "step_index", None)
        marker = _marker(pipeline, scheduler, timestep) if explicit is None else ()
        timesteps = getattr(scheduler, "timesteps", None)

        fresh = self.ended or size != self._size or timesteps is not self._timesteps
        if explicit is not None:
            fresh = fresh or explicit < self.step
            moved = explicit != self.step
        else:
            fresh = fresh or self._turned_back(marker)
            moved = not _same(self._marker, marker)
        if fresh:
            self.engine.reset()
            self.step, self.call, self._direction = explicit or 0, 0, 0
        elif moved:
            self.step, self.call = self.step + 1 if explicit is None else explicit, 0
        else:
            self.call += 1
        self.ended = False
        self._size, self._marker, self._timesteps = size, marker, timesteps
        self.num_steps = _num_steps(announced, pipeline, scheduler)
        return fresh

    def _turned_back(self, marker: tuple[Any, ...]) -> bool:
        """The scheduler's index fell, or timesteps changed direction: most models count down, Mochi counts up."""
        old = self._marker
        if not old or old[0] != marker[0]:
            return True
        direction = (marker[1] > old[1]) - (marker[1] < old[1])
        expected = 1 if marker[0] == "host" else self._direction
        self._direction = direction or self._direction
        return direction == -expected != 0

    def branch(self, announced: Any) -> str:
        """Guidance branch of this forward pass: by name if announced, else by its order within the step."""
        name = getattr(announced, "name", None)
        if name is not None:
            return {"pred_cond": "cond", "pred_uncond": "uncond"}.get(name, str(name))
        return ("cond", "uncond")[self.call] if self.call < 2 else f"call{self.call}"


def _marker(pipeline: Any, scheduler: Any, timestep: Any) -> tuple[Any, ...]:
    """Something that differs between steps and is equal within one: (source, scheduler index, timestep object)."""
    current = getattr(pipeline, "_current_timestep", None)
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        return ("host", -1 if index is None else int(index), current)
    if current is not None:
        return ("host", 0, current)
    value = timestep.max().item() if isinstance(timestep, Tensor) else float(timestep if timestep is not None else 0)
    return ("value", value, None)


def _same(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    return bool(old) and old[:2] == new[:2] and old[2] is new[2]


def _num_steps(announced: Any, pipeline: Any, scheduler: Any) -> int | None:
    timesteps = getattr(scheduler, "timesteps", None)
    for count in (
        getattr(announced, "num_inference_steps", None),
        getattr(pipeline, "_num_timesteps", None),
        getattr(scheduler, "num_inference_steps", None),
        len(timesteps) if timesteps is not None else None,
    ):
        if count:
            return int(count)
    return None


@dataclass
class _Pass:
    """One forward pass of a transformer."""

    size: Size
    history: int
    branch: str
    mask: Tensor | None = None
    key_lengths: Tensor | None = None


class ModelContext(custom_op.Addressable):
    """Forward pre-hook of one transformer; knows the current call for every attention layer of it.

    Args:
        transformer: not kept.
        model: name of the transformer in its pipeline.
        family: facts about its layout.
        run: shared by all transformers of the pipeline.
        num_layers: attention layers that dsattn handles.

    """

    def __init__(self, transformer: nn.Module, model: str, family: Family, run: Run, num_layers: int) -> None:
        self.model, self.family, self.run, self.num_layers = model, family, run, num_layers
        self.patch = family.patch(getattr(transformer, "config", None))
        self.parameters = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self.carrier = Carrier(run)
        self._pass: _Pass | None = None
        self._starts = True
        self._coords: tuple[Tensor | None, Size] = (None, (0, 0, 0))
        self.assign_address()

    def attach(self, transformer: nn.Module) -> None:
        """Hook the transformer."""
        self.carrier.attach(transformer)
        transformer.register_forward_pre_hook(self, with_kwargs=True)

    @staticmethod
    def of(transformer: nn.Module) -> ModelContext | None:
        """The context that hooks this transformer, if any."""
        hooks = transformer._forward_pre_hooks.values()
        return next((hook for hook in hooks if isinstance(hook, ModelContext)), None)

    def detach(self, transformer: nn.Module) -> None:
        """Unhook the transformer; what other hooks it had stays as it was."""
        hooks = transformer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
            transformer._forward_pre_hooks_with_kwargs.pop(key, None)
        self.carrier.detach(transformer)
        self.release_address()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: note grid, step and branch of this pass."""
        named: Mapping[str, Any] = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        size = self.family.grid(named, self.patch)
        coords = named.get(self.family.coords) if self.family.coords is not None and size is None else None
        timestep = named.get("timestep")
        history = self.family.history(named) if self.family.history is not None else 0
        dims = [*size, history] if size is not None else []
        if not torch.compiler.is_compiling():
            self.begin(timestep, coords, tuple(dims))
            if self._starts:
                self._check_processors(module)
            return None
        if not isinstance(timestep, Tensor):
            raise TypeError(f"a compiled transformer needs 'timestep' as a tensor, got {type(timestep).__name__}")
        ordered = torch.ops.dsattn.begin(timestep, coords, dims, self.dsattn_address)
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": ordered}
        position = self.parameters.index("timestep")
        return (*args[:position], ordered, *args[position + 1 :]), kwargs

    def _check_processors(self, module: nn.Module) -> None:
        """Warn at the start of a run if other processors took the place of ours, which silently run dense."""
        ours = sum(isinstance(getattr(m, "processor", None), custom_op.Addressable) for m in module.modules())
        if ours != self.num_layers:
            warnings.warn(
                f"{ours} of {self.num_layers} attention layers of {self.model} run through dsattn: other processors "
                "were set after dsattn.enable(). Call dsattn.disable(...) and enable it again",
                stacklevel=2,
            )

    def begin(self, timestep: Any, coords: Tensor | None, dims: tuple[int, ...]) -> None:
        """Start of a forward pass, see :func:`dsattn.pipelines.custom_op.begin`."""
        announced = self.carrier.announced
        if dims:
            frames, height, width, history = (int(dim) for dim in dims)
            size: Size = (frames, height, width)
        elif coords is not None:
            size, history = self._size_of(coords), 0
        else:
            self._pass = None
            return
        self._starts = self.run.begin(announced, timestep, size)
        self._pass = _Pass(size, history, self.run.branch(announced))

    def _size_of(self, coords: Tensor) -> Size:
        known, size = self._coords
        if known is not coords:
            size = grid_from_coords(coords)
            self._coords = (coords, size)
        return size

    def call(self, layer: int, tokens: int, row: int, first_head: int) -> Call | str:
        """The attention call of ``tokens`` tokens in ``layer``, or why it is none dsattn can describe."""
        now = self._pass
        if now is None:
            return "no grid: the transformer got neither sizes nor coordinates, or forward() was called directly"
        frames, height, width = now.size
        extra = tokens - frames * height * width - now.history
        if extra < 0:
            return f"{tokens} tokens are fewer than the {frames}x{height}x{width} grid and its history"
        where = self.family.extra
        prefix = now.history + (extra if where == "prefix" else 0)
        text = 0 if where == "prefix" else extra
        grid = VideoGrid(frames, height, width, text=text, text_first=where == "text_first", prefix=prefix)
        return Call(
            layer=layer,
            step=self.run.step,
            grid=grid,
            num_layers=self.num_layers,
            num_steps=self.run.num_steps,
            branch=now.branch if row < 0 else f"{now.branch}[{row}]",
            first_head=first_head,
            model=self.model,
        )

    def key_lengths(self, mask: Tensor) -> Tensor:
        """Valid leading keys ``[B]`` (int32) of a key mask ``[B, 1, 1, S]``; once per pass, on the device."""
        now = self._pass
        if now is None or now.mask is not mask or now.key_lengths is None:
            lengths = mask.flatten(1).sum(1, dtype=torch.int32)
            if now is None:
                return lengths
            now.mask, now.key_lengths = mask, lengths
        return now.key_lengths
