"""Formulas of the retrieval loss in double precision, row by row.

`case` is the Case of tests/losses/test_retrieval_loss.py.
"""

import jax
import numpy as np


def contrast(case, noises, hardness=1.0):
  """(itc, {(side, row): its negative}) of the case, row by row.

  Side 0 has the text for each image, side 1 the image for each text. Alpha is half of 0.4 at step 1
  of a ramp of 2.
  """
  state = case.state
  (x, y), (x_teacher, y_teacher) = (case.features(p) for p in (state.params, state.ema_params))
  ids = np.concatenate([case.batch["id"], state.extra["idx_queue"][0]])
  counts = np.concatenate([~case.batch["corrupt"], np.ones(12, bool)])
  temperature, alpha, rows = (
    float(state.params["temp"]["value"]),
    0.2,
    np.flatnonzero(~case.batch["corrupt"]),
  )
  itc, given, sides = (
    [],
    {},
    ((x, x_teacher, y_teacher, "text_queue"), (y, y_teacher, x_teacher, "image_queue")),
  )
  for side, (student, teacher, others, queue) in enumerate(sides):
    columns = np.concatenate([others, state.extra[queue].T.astype(np.float64)])
    for i in rows:
      student_scores, teacher_scores = (
        np.where(counts, features[i] @ columns.T / temperature, -np.inf)
        for features in (student, teacher)
      )
      soft = np.exp(teacher_scores) / np.exp(teacher_scores).sum()
      same = (ids == ids[i]) & counts
      target = alpha * soft + (1 - alpha) * same / same.sum()
      log = student_scores - np.log(np.exp(student_scores).sum())
      itc.append(-(target[counts] * log[counts]).sum() / 2)
      # Hard negatives: the largest similarity plus noise among the four rows of the group that
      # count and show another image.
      group = range(i // 4 * 4, i // 4 * 4 + 4)
      allowed = [j for j in group if j in rows and ids[j] != ids[i]]
      if allowed:
        given[side, i] = max(
          allowed, key=lambda j: hardness * student_scores[j] + noises[side][i, j % 4]
        )
  return np.sum(itc), given


def match(case, given):
  """(itm, pairs matched) with these negatives, every pair fused alone."""
  ((image, _), (text, mask, _)), _ = case.encode(case.state.params)
  pairs = [(i, i, 1) for i in np.flatnonzero(~case.batch["corrupt"])] + [
    (i, j, 0) if side == 0 else (j, i, 0) for (side, i), j in given.items()
  ]
  images, texts, labels = map(np.array, zip(*pairs))
  logits = case.match_logits(case.state.params, text[texts], mask[texts], image[images])
  logits = np.asarray(logits, np.float64)
  itm = np.log(np.exp(logits).sum(1)) - logits[range(len(pairs)), labels]
  return itm.sum(), len(pairs)


@jax.jit
def noises_of(key):
  """Noise of the negatives: (of a text for each image, of an image for each text), [8, 4] each.

  The key is that of `compare`.
  """
  image, text = jax.random.split(key)
  return jax.random.gumbel(text, (8, 4)), jax.random.gumbel(image, (8, 4))


def clip(x, y, temperature, ids, counted):
  """CLIP's loss, its gradient by the features [2, 8, E] and by the temperature."""
  scores = x[counted] @ y[counted].T / temperature
  same = ids[counted][:, None] == ids[counted]
  target = same / same.sum(1, keepdims=True)
  loss, slope = 0.0, np.zeros_like(scores)
  for s, slopes in ((scores, slope), (scores.T, slope.T)):  # views, which are changed
    log = s - np.log(np.exp(s).sum(1, keepdims=True))
    loss -= (log * target).sum() / 2 / len(counted)
    slopes += (np.exp(log) - target) / 2 / len(counted)
  features = np.zeros((2, *x.shape))
  features[0, counted] = slope @ y[counted] / temperature
  features[1, counted] = slope.T @ x[counted] / temperature
  return loss, features, -(slope * scores).sum() / temperature
