"""Switch sparse attention on and off in diffusers pipelines.

:func:`enable` wraps the self-attention processors of every video transformer of a pipeline and hooks their forward;
:meth:`Handle.remove` puts the original objects back. One engine serves a pipeline, also over two transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dsattn.config import DEFAULT_METHOD, Config
from dsattn.engine import Engine, as_engine
from dsattn.errors import UsageError
from dsattn.head_profile import HeadProfile
from dsattn.pipelines.context import ModelContext, Run
from dsattn.pipelines.facts import describe_pipeline
from dsattn.pipelines.overlay import SparseProcessor, unwrap, wrap
from dsattn.pipelines.registry import family_of, find_transformers, preset_family
from dsattn.presets import over_preset, preset

Method = str | Path | Config | Engine


class Handle:
    """Sparse attention in force on a pipeline or transformer.

    Attributes:
        engine: the engine that serves it.
        transformers: the transformers it was put on, by component name.

    """

    def __init__(self, engine: Engine, transformers: dict[str, nn.Module], facts: dict[str, str]) -> None:
        self.engine = engine
        self.transformers = transformers
        self._facts = facts

    def __repr__(self) -> str:
        state = ", ".join(
            f"{name}: {len(_sparse_modules(module))} attention layers" for name, module in self.transformers.items()
        )
        return f"Handle({state})"

    def summary(self) -> dict[str, Any]:
        """What the engine has done in the current or last run, as plain values.

        Returns:
            ``method``, ``config``; ``calls`` by kind; ``density_all_calls``, ``density_sparse_calls``,
            ``density_by_layer``, ``density_by_step`` (shares of all pairs); ``estimated_error`` in all, by layer and
            by step (relative L2); ``impls``, ``dense_reasons``, ``refresh_reasons`` and ``fallbacks`` (numbers of
            calls); ``plan_s``, ``attend_s``, ``monitor_s`` (seconds, 0 without ``timing``); ``compile_s`` (seconds of
            these spent compiling kernels, with or without ``timing``); ``plan_bytes``.

        """
        return dict(self.engine.summary())

    def head_profile(self) -> HeadProfile:
        """What ``auto`` measured of every head in the current or last run, to be saved and used for other prompts.

        Under context parallelism it holds the heads of this process only.

        Raises:
            UsageError: the method is not ``auto``, nothing has been measured, or calls of one run differ in their grid.

        """
        if self.engine.method.name != "auto":
            raise UsageError(f"only the method 'auto' profiles heads; this is {self.engine.method.name!r}")
        layers = {
            (model, branch, layer): profile
            for (model, branch, _), found in sorted(self.engine.state.shared.items(), key=lambda item: item[0][:2])
            for layer, profile in sorted(found.get("auto", {}).items())
        }
        if not layers:
            raise UsageError(
                "no head has been measured: run the pipeline first, with at least one sparse step, and take the "
                "profile before handle.remove()"
            )
        entries = self.engine.state.entries
        grids = sorted((entries[m, layer, branch].layout.grid for m, branch, layer in layers), key=lambda g: g.text)
        others = {replace(grid, text=0) for grid in grids}
        if len(others) > 1:
            raise UsageError(f"a profile holds for one token grid, the calls of this run have {len(others)}: {others}")
        context = next((c for c in map(ModelContext.of, self.transformers.values()) if c is not None), None)
        return HeadProfile(layers, grids[-1], None if context is None else context.run.num_steps, dict(self._facts))

    def remove(self) -> None:
        """Put the original processor objects and hooks back; harmless when already done."""
        for transformer in self.transformers.values():
            context = ModelContext.of(transformer)
            if context is not None and context.run.engine is self.engine:
                _uninstall(transformer)


class SparseAttnProcessor:
    """What ``pipe.set_attn_processor(...)`` and ``transformer.set_attn_processor(...)`` take.

    A request, not a processor that runs: it makes the pipeline wrap the processors of its video self-attention and
    leaves cross-attention, text refiners and audio alone.

    Args:
        method: as for :func:`enable`.
        **options: as for :func:`enable`; they are checked when the request is used.

    """

    dsattn_request = True

    def __init__(self, method: Method | None = None, **options: Any) -> None:
        self.method = method
        self.options = options

    def __repr__(self) -> str:
        method = [] if self.method is None else [repr(self.method)]
        return f"SparseAttnProcessor({', '.join(method + [f'{n}={v!r}' for n, v in self.options.items()])})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Always raises: reached only when it was put on attention modules one by one."""
        raise RuntimeError(
            "SparseAttnProcessor was set on an attention module itself, which has lost its own processor. "
            "Load the transformer again, then use dsattn.enable(pipe, ...), pipe.set_attn_processor(...) or "
            "transformer.set_attn_processor(dsattn.attn_processors(transformer, ...))"
        )


def enable(target: Any, method: Method | None = None, **options: Any) -> Handle:
    """Run the video self-attention of a pipeline or transformer through dsattn.

    Args:
        target: a diffusers pipeline (all its video transformers are taken) or one transformer.
        method: name of a method, a ``Config``, path of a YAML config, or an :class:`~dsattn.engine.Engine` of its own.
            None is the default method, with a preset ``auto``.
        **options: options of the method and the engine, such as ``density``, ``dense_steps``, ``strict``; or
            ``preset="safe" | "balanced" | "fast"``, whose values other options replace.

    Raises:
        ValueError: no transformer is supported, none of its attention modules is recognised, or a head profile was
            made for another model or scheduler; also ``UsageError``: an unknown method or option, or a value out of
            range.
        RuntimeError: dsattn is already enabled there.

    """
    handle, processors = _prepare(target, method, options)
    for name, transformer in handle.transformers.items():
        modules = dict(transformer.named_modules())
        for path, processor in processors[name].items():
            _set_processor(modules[path], processor)
    return handle


def disable(target: Any) -> None:
    """Undo :func:`enable` on every transformer of ``target``; nothing happens where it is not enabled."""
    for transformer in find_transformers(target).values():
        _uninstall(transformer)


@contextmanager
def enabled(target: Any, method: Method | None = None, **options: Any) -> Iterator[Handle]:
    """:func:`enable` for the length of a ``with`` block; arguments and errors are the same."""
    handle = enable(target, method, **options)
    try:
        yield handle
    finally:
        handle.remove()


def summary(target: Any) -> dict[str, Any]:
    """What dsattn has done on this pipeline or transformer, see :meth:`Handle.summary`.

    Raises:
        RuntimeError: dsattn is not enabled there.

    """
    for transformer in find_transformers(target).values():
        context = ModelContext.of(transformer)
        if context is not None:
            return dict(context.run.engine.summary())
    raise RuntimeError(f"dsattn is not enabled on this {type(target).__name__}; call dsattn.enable(...) first")


def attn_processors(transformer: nn.Module, method: Method | None = None, **options: Any) -> dict[str, Any]:
    """Full dictionary for ``transformer.set_attn_processor(...)``.

    Video self-attention gets a sparse processor, every other module keeps its own object. The transformer's forward is
    hooked at once, which changes nothing until the dictionary is set; :func:`disable` undoes both.

    Args:
        transformer: a diffusers video transformer.
        method: as for :func:`enable`.
        **options: as for :func:`enable`.

    Raises:
        TypeError: ``transformer`` has no ``set_attn_processor`` (use :func:`enable`).
        ValueError, RuntimeError: as :func:`enable`.

    """
    stock = getattr(transformer, "attn_processors", None)
    if not isinstance(stock, dict):
        raise TypeError(f"{type(transformer).__name__} has no set_attn_processor; use dsattn.enable(...) for it")
    _, processors = _prepare(transformer, method, options)
    return {**stock, **{f"{path}.processor": value for path, value in processors["transformer"].items()}}


def set_attn_processor(target: Any, processor: Any) -> None:
    """Behind ``pipe.set_attn_processor``: a :class:`SparseAttnProcessor` replaces what dsattn had set.

    Anything else is handed to the denoising models as it is, after dsattn has been taken off them.

    Args:
        target: a diffusers pipeline or a transformer.
        processor: a request, or a processor (or dictionary of them) as diffusers takes it.

    Raises:
        AttributeError: the pipeline has no denoising model whose processors can be set.

    """
    if isinstance(processor, SparseAttnProcessor):
        for transformer in find_transformers(target).values():
            _uninstall(transformer)
        enable(target, processor.method, **processor.options)
        return
    components = {"transformer": target} if isinstance(target, nn.Module) else target.components
    models: list[Any] = [
        model
        for name, model in components.items()
        if name.startswith(("transformer", "unet")) and hasattr(model, "set_attn_processor")
    ]
    if not models:
        raise AttributeError(f"{type(target).__name__} has no transformer or unet with set_attn_processor")
    for model in models:
        if family_of(model) is not None:
            _uninstall(model)
        model.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)


def _prepare(
    target: Any, method: Method | None, options: dict[str, Any]
) -> tuple[Handle, dict[str, dict[str, SparseProcessor]]]:
    """Hook the transformers of ``target`` and build their processors, without setting them."""
    transformers = find_transformers(target)
    plans = []
    for name, transformer in transformers.items():
        family = family_of(transformer)
        modules = family.attention_modules(transformer) if family is not None else []
        if family is None or not modules:
            raise ValueError(
                f"no attention module of {name} ({type(transformer).__name__}) has a name dsattn knows for this model; "
                "this diffusers version may have renamed them"
            )
        if _sparse_modules(transformer):
            raise RuntimeError(
                f"dsattn is already enabled on {name}; call handle.remove() or dsattn.disable(...) first"
            )
        plans.append((name, transformer, family, modules))
    if options.get("preset") is not None:
        method, options = _with_preset(method, options, preset_family(target))
    engine = as_engine(DEFAULT_METHOD if method is None else method, **options)
    facts = describe_pipeline(target)
    _check_profile(engine, facts)
    run = Run(engine, None if isinstance(target, nn.Module) else target)
    processors, contexts = {}, []
    for name, transformer, family, modules in plans:
        context = ModelContext(transformer, name, family, run, len(modules))
        contexts.append((context, transformer))
        processors[name] = {
            path: wrap(module.processor, context, layer) for layer, (path, module) in enumerate(modules)
        }
    for context, transformer in contexts:
        _uninstall(transformer)  # hooks left by attn_processors() whose result was replaced
        context.attach(transformer)
    return Handle(engine, transformers, facts), processors


def _with_preset(method: Method | None, options: dict[str, Any], family: str) -> tuple[Method, dict[str, Any]]:
    if method not in (None, "auto"):
        raise UsageError(f"a preset sets the error budget of the method 'auto', got {method!r} beside it")
    given = {name: value for name, value in options.items() if name != "preset"}
    values = over_preset(preset(options["preset"], family), given)
    return values.pop("method"), values


def _check_profile(engine: Engine, facts: dict[str, str]) -> None:
    """Refuse a head profile of another pipeline.

    Raises:
        UsageError: the profile cannot be read, or was made with another model or scheduler.

    """
    profile: HeadProfile | None = getattr(engine.method_config, "measured", None)
    why = None if profile is None else profile.mismatch(facts)
    if why is not None:
        file = engine.method_config.profile
        raise UsageError(f"profile {file} does not fit: {why}; make a new one with 'dsattn profile'")


def _uninstall(transformer: nn.Module) -> None:
    for module in _sparse_modules(transformer):
        processor: Any = module.processor
        _set_processor(module, unwrap(processor))
    context = ModelContext.of(transformer)
    if context is not None:
        context.detach(transformer)
        context.run.engine.state.clear()  # plans hold device memory; the statistics stay readable


def _sparse_modules(transformer: nn.Module) -> list[nn.Module]:
    return [m for m in transformer.modules() if isinstance(getattr(m, "processor", None), SparseProcessor)]


def _set_processor(module: nn.Module, processor: Any) -> None:
    """As the module's own setter would; some attention classes have none."""
    setter: Any = getattr(module, "set_processor", None)
    if callable(setter):
        setter(processor)
    else:
        module.processor = processor
