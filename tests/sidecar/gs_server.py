"""`python gs_server.py PORT BUCKET`: gcp-storage-emulator, and the condition "only if there is none yet".

The emulator takes ifGenerationMatch and does not look at it. Here a request with ifGenerationMatch=0 is answered with
412 when the object exists, as Cloud Storage's JSON API documents.
"""

import sys
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_insert = objects.insert


def insert(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
    if request.query.get("ifGenerationMatch") != ["0"]:
        _insert(request, response, storage, *args, **kwargs)
        return
    name = request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]
    try:  # the server has one thread, so nothing comes between the look and the write
        storage.get_file_obj(request.params["bucket_name"], name)
    except NotFound:
        _insert(request, response, storage, *args, **kwargs)
        return
    response.status = HTTPStatus.PRECONDITION_FAILED
    response.json({"error": {"code": 412, "message": "At least one of the pre-conditions you specified did not hold."}})


objects.insert = insert  # before the server module makes its table of handlers

from gcp_storage_emulator.server import create_server  # noqa: E402

server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2])
server.run()
