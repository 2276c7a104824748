"""Boxes: corners and centres, overlaps, and the bins that location tokens stand for.

Corners are (x1, y1, x2, y2) with exclusive ends, a centred box is (centre x, centre y, width,
height). All are floats [..., 4] in any unit, of numpy or of JAX: the result is of the same kind.
"""

_EPSILON = 1e-5  # of the denominators of `generalised_iou`, as in the official loss


def to_corners(centred):
  """Centred boxes [..., 4] -> corners [..., 4]."""
  xp = centred.__array_namespace__()
  middle, half = centred[..., :2], centred[..., 2:] / 2
  return xp.concatenate([middle - half, middle + half], axis=-1)


def to_centred(corners):
  """Corners [..., 4] -> centred boxes [..., 4]."""
  xp = corners.__array_namespace__()
  low, high = corners[..., :2], corners[..., 2:]
  return xp.concatenate([(low + high) / 2, high - low], axis=-1)


def _areas(a, b):
  """Corners [..., 4] twice -> (intersection, union, hull) [...].

  A box whose ends are exchanged counts as empty.
  """
  xp = a.__array_namespace__()

  def area(low, high):
    return xp.prod(xp.maximum(high - low, 0), axis=-1)

  shared = area(xp.maximum(a[..., :2], b[..., :2]), xp.minimum(a[..., 2:], b[..., 2:]))
  hull = area(xp.minimum(a[..., :2], b[..., :2]), xp.maximum(a[..., 2:], b[..., 2:]))
  return shared, area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared, hull


def iou(a, b):
  """Intersection over union of corners [..., 4], pair by pair -> [...]; 0 for two empty boxes."""
  xp = a.__array_namespace__()
  shared, union, _ = _areas(a, b)
  return shared / xp.where(union > 0, union, 1)


def generalised_iou(a, b):
  """IoU minus the share of the common hull that neither box covers (Rezatofighi et al. 2019): corners [..., 4] -> [...] in [-1, 1]."""
  shared, union, hull = _areas(a, b)
  return shared / (union + _EPSILON) - (hull - union) / (hull + _EPSILON)


ROUNDINGS = ("down", "nearest")


def quantise(shares, bins, rounding="down"):
  """Shares of the image, any float shape -> i32 of that shape in 0..bins: rounded, and clipped to the image.

  Both ends have a bin, so there are `bins` + 1. `rounding` is one of ROUNDINGS; "down", the
  official one, moves boxes up and to the left by half a bin on average.
  """
  xp = shares.__array_namespace__()
  return xp.floor(xp.clip(shares, 0, 1) * bins + (0.5 if rounding == "nearest" else 0)).astype(
    xp.int32
  )


def dequantise(numbers, bins):
  """Numbers of bins -> f32, the share of the image where each bin begins."""
  xp = numbers.__array_namespace__()
  return numbers.astype(xp.float32) / xp.float32(bins)
