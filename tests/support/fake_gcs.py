"""Google Cloud Storage in this process, for gs:// paths without a network.

One dictionary of objects is served twice: over HTTP, as the JSON API that TensorStore's own client
speaks (Orbax writes arrays through it), and as the fsspec file system "gcs", which etils.epath uses
for all other files. Buckets have no folders: a folder exists as long as an object is inside.
"""

import contextlib
import http.server
import itertools
import json
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations import memory

_LIST = "/storage/v1/b/"
_UPLOAD = "/upload/storage/v1/b/"


class Store:
  """Objects of all buckets.

  Attributes:
    objects: {"bucket/name": (bytes, generation)}.
    uploads: names in the order in which they were written.
  """

  def __init__(self) -> None:
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.uploads: list[str] = []
    self._generations = itertools.count(1)
    self._lock = threading.Lock()

  def put(self, name: str, data: bytes, generation: int | None = None) -> int | None:
    """Writes an object; returns its generation, None if it is not of the expected `generation`."""
    with self._lock:
      if generation is not None and self.generation(name) != generation:
        return None
      self.objects[name] = (bytes(data), next(self._generations))
      self.uploads.append(name)
      return self.objects[name][1]

  def delete(self, name: str, generation: int | None = None) -> bool | None:
    """Deletes an object; None if it is not of the expected `generation`, False if absent."""
    with self._lock:
      if generation is not None and self.generation(name) != generation:
        return None
      return self.objects.pop(name, None) is not None

  def generation(self, name: str) -> int:
    """Generation of an object, 0 if it does not exist."""
    return self.objects.get(name, (b"", 0))[1]

  def names(self, prefix: str) -> list[str]:
    """Names that begin with a prefix, sorted."""
    with self._lock:
      return sorted(name for name in self.objects if name.startswith(prefix))


class _Handler(http.server.BaseHTTPRequestHandler):
  """The part of the JSON API that TensorStore uses."""

  store: Store
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  wbufsize = -1  # Headers and body leave in one packet.

  def log_message(self, *unused: Any) -> None:
    pass

  def _answer(self, status: int, body: bytes = b"", **headers: Any) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    if status not in (204, 304):
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if status not in (204, 304):
      self.wfile.write(body)

  def _parse(self) -> tuple[str, dict[str, str]]:
    """Returns the object's name with its bucket, or the bucket with a slash; and the query."""
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    path = url.path.removeprefix(_UPLOAD).removeprefix(_LIST)
    bucket, _, name = path.partition("/o")
    return f"{bucket}/{query.get('name') or urllib.parse.unquote(name.lstrip('/'))}", query

  def do_GET(self) -> None:
    name, query = self._parse()
    if query.get("alt") == "media":
      self._get(name, query)
    else:
      self._list(name, query)

  def _get(self, name: str, query: dict[str, str]) -> None:
    data, generation = self.store.objects.get(name, (b"", 0))
    if not generation:
      return self._answer(404)
    if query.get("ifGenerationNotMatch") == str(generation):
      return self._answer(304, x_goog_generation=generation)
    if query.get("ifGenerationMatch") not in (None, str(generation)):
      return self._answer(412)
    span = self.headers.get("Range", "").removeprefix("bytes=")
    if not span:
      return self._answer(200, data, x_goog_generation=generation)
    first, _, last = span.partition("-")
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1 if first and last else len(data))
    content_range = f"bytes {start}-{stop - 1}/{len(data)}"
    return self._answer(
      206, data[start:stop], x_goog_generation=generation, Content_Range=content_range
    )

  def _list(self, bucket: str, query: dict[str, str]) -> None:
    begin = query.get("startOffset", "")
    end = query.get("endOffset")
    names = [name.removeprefix(bucket) for name in self.store.names(bucket)]
    items = [
      {"name": name, "size": str(len(self.store.objects[bucket + name][0]))}
      for name in names
      if name >= begin and (end is None or name < end)
    ]
    self._answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")

  def do_POST(self) -> None:
    name, query = self._parse()
    data = self.rfile.read(int(self.headers["Content-Length"]))
    expected = query.get("ifGenerationMatch")
    generation = self.store.put(name, data, None if expected is None else int(expected))
    if generation is None:
      return self._answer(412)
    described = {"name": name.partition("/")[2], "generation": str(generation)}
    return self._answer(200, json.dumps(described).encode(), Content_Type="application/json")

  def do_DELETE(self) -> None:
    name, query = self._parse()
    expected = query.get("ifGenerationMatch")
    deleted = self.store.delete(name, None if expected is None else int(expected))
    self._answer(412 if deleted is None else 204 if deleted else 404)


class _File(memory.MemoryFile):
  """A file in memory that is uploaded when it is closed."""

  def __init__(self, store: Store, name: str, data: bytes, upload: bool) -> None:
    super().__init__(None, name, data)
    self._store = store
    self._name = name
    self._upload = upload
    self.seek(0)

  def __enter__(self) -> "_File":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def close(self) -> None:
    if self._upload:
      self._store.put(self._name, self.getvalue())
      self._upload = False


class FileSystem(fsspec.AbstractFileSystem):
  """The objects as gcsfs shows them: no folders of their own, mkdir does nothing, no append."""

  protocol = ("gs", "gcs")
  cachable = False
  store: Store

  def _parts(self, path: str) -> tuple[str, list[str]]:
    name = str(self._strip_protocol(path))
    return name, self.store.names(f"{name}/")

  def info(self, path: str, **unused: Any) -> dict[str, Any]:
    name, inside = self._parts(path)
    if name in self.store.objects:
      return {"name": name, "size": len(self.store.objects[name][0]), "type": "file"}
    if inside or "/" not in name:
      return {"name": name, "size": 0, "type": "directory"}
    raise FileNotFoundError(path)

  def ls(self, path: str, detail: bool = True, **unused: Any) -> list[Any]:
    name, inside = self._parts(path)
    if not inside:
      self.info(path)
      children = [name] if name in self.store.objects else []
    else:
      children = sorted({f"{name}/{x.removeprefix(name + '/').split('/')[0]}" for x in inside})
    return [self.info(child) for child in children] if detail else children

  def mkdir(self, path: str, create_parents: bool = True, **unused: Any) -> None:
    pass

  def makedirs(self, path: str, exist_ok: bool = False) -> None:
    pass

  def rmdir(self, path: str) -> None:
    pass

  def rm_file(self, path: str) -> None:
    if not self.store.delete(self._strip_protocol(path)):
      raise FileNotFoundError(path)

  def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
    name, inside = self._parts(path)
    if name not in self.store.objects and not (recursive and inside):
      raise FileNotFoundError(path)
    for each in [name, *inside]:
      self.store.delete(each)

  def cp_file(self, path1: str, path2: str, **unused: Any) -> None:
    name = self._strip_protocol(path1)
    if name in self.store.objects:
      self.store.put(self._strip_protocol(path2), self.store.objects[name][0])

  def _open(self, path: str, mode: str = "rb", **unused: Any) -> Any:
    name = self._strip_protocol(path)
    if "a" in mode:
      raise NotImplementedError("Objects cannot be appended to.")
    if "r" in mode and name not in self.store.objects:
      raise FileNotFoundError(path)
    return _File(self.store, name, self.store.objects[name][0] if "r" in mode else b"", "w" in mode)


@contextlib.contextmanager
def serve(patch: pytest.MonkeyPatch) -> Iterator[Store]:
  """Serves gs:// paths from memory inside the block; yields the Store."""
  store = Store()
  server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store})
  )
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, daemon=True).start()
  patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
  patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
  # Orbax asks for the kind of bucket through this package when it deletes.
  storage = types.ModuleType("google.cloud.storage")
  storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: None)  # pyright: ignore
  cloud = types.ModuleType("google.cloud")
  cloud.storage = storage  # pyright: ignore
  patch.setitem(sys.modules, "google.cloud", cloud)
  patch.setitem(sys.modules, "google.cloud.storage", storage)
  patch.setattr(FileSystem, "store", store, raising=False)
  for protocol in FileSystem.protocol:
    patch.setitem(sys.modules["fsspec.registry"]._registry, protocol, FileSystem)
  backend.fsspec_backend._get_filesystem.cache_clear()
  try:
    yield store
  finally:
    backend.fsspec_backend._get_filesystem.cache_clear()
    server.shutdown()
    server.server_close()
