"""The primitive by which only the form of the platform that is lowered for is ever traced.

`jax.lax.platform_dependent` would trace the forms of all platforms: a third more time to trace a
tiny train step on CPU.
"""

import functools
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from mplug_jax.ops.attention.common import Form, Options
from mplug_jax.ops.attention.reference import PLAIN

Forms = tuple[tuple[str, Form], ...]  # (platform, form)

PRIMITIVE = Primitive("attention")
PRIMITIVE.multiple_results = True


def run(forms: Forms, direction: str, options: Options, *args: Any) -> Any:
  """Returns the result of the form for the platform, chosen when the program is lowered.

  Args:
    forms: those of the platforms that do not use the reference.
    direction: "forward" or "backward", a field of Form.
    options: options of the call.
    *args: arguments of that field after the options.
  """
  arrays, tree = jax.tree.flatten(args)
  mesh = jax.sharding.get_abstract_mesh()
  return PRIMITIVE.bind(
    *arrays, forms=forms, direction=direction, options=options, tree=tree, mesh=mesh
  )


_STATIC = ("form", "direction", "options", "tree", "mesh")


@functools.partial(jax.jit, static_argnames=_STATIC)  # equal layers of a program are traced once
def _run(*arrays, form, direction, options, tree, mesh):
  args = jax.tree.unflatten(tree, arrays)
  with jax.sharding.use_abstract_mesh(mesh):
    return tuple(getattr(form, direction)(options, *args))


def run_on(platform: str, *arrays: Any, forms: Forms, **params: Any) -> Any:
  """Returns the result of the form for a platform, of the reference if it has none.

  Args:
    platform: as in `forms`, or "" for the reference.
    *arrays: operands of the primitive.
    forms: and the rest: parameters of the primitive.
    **params: see `forms`.
  """
  return _run(*arrays, form=dict(forms).get(platform, PLAIN), **params)


@functools.partial(jax.jit, static_argnames=("forms", *_STATIC[1:]))
def _eager(*arrays, **params):
  return PRIMITIVE.bind(*arrays, **params)


def _shapes(*arrays, direction, options, tree, **_):
  query, key, value, *_ = jax.tree.unflatten(tree, arrays)
  if direction == "backward":
    return [ShapedArray(x.shape, x.dtype) for x in (query, key, value)]
  numbers = ShapedArray((query.shape[0], options.heads, query.shape[1], 1), jax.numpy.float32)
  return [ShapedArray(query.shape, value.dtype), numbers, numbers]


def _batch(arrays, axes, **params):
  outputs = jax.vmap(functools.partial(run_on, "", **params), axes)(*arrays)
  return outputs, (0,) * len(outputs)


PRIMITIVE.def_impl(_eager)
PRIMITIVE.def_abstract_eval(_shapes)
batching.primitive_batchers[PRIMITIVE] = _batch
for _platform in ("", "cpu", "tpu", "cuda"):
  mlir.register_lowering(
    PRIMITIVE, mlir.lower_fun(functools.partial(run_on, _platform)), platform=_platform or None
  )
