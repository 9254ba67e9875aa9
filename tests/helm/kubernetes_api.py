"""An in-memory Kubernetes API, enough for real helm to install, upgrade, roll back, test and remove a release.

It checks bodies against the schemas of Kubernetes, refuses changed selectors, and plays the controllers' part in one
step: Deployments become available and pods succeed as soon as they are stored. It has no defaulting, admission,
scheduling or RBAC. Each template that a Deployment has had is kept in `rollouts`.
"""

import base64
import copy
import json
import re
import threading
import uuid
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.helm.charts import Object
from tests.helm.validation import check_object

__all__ = ["KubernetesApi"]

# group/version -> plural -> kind
RESOURCES = {
    "v1": {
        "pods": "Pod",
        "services": "Service",
        "serviceaccounts": "ServiceAccount",
        "secrets": "Secret",
        "configmaps": "ConfigMap",
        "namespaces": "Namespace",
        "persistentvolumeclaims": "PersistentVolumeClaim",
    },
    "apps/v1": {"deployments": "Deployment", "replicasets": "ReplicaSet"},
    "batch/v1": {"jobs": "Job"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy", "ingresses": "Ingress"},
    "gateway.networking.k8s.io/v1": {"httproutes": "HTTPRoute"},
    "resource.k8s.io/v1": {"resourceclaimtemplates": "ResourceClaimTemplate"},
    "rbac.authorization.k8s.io/v1": {"roles": "Role", "rolebindings": "RoleBinding"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "monitoring.coreos.com/v1": {"servicemonitors": "ServiceMonitor", "prometheusrules": "PrometheusRule"},
    "inference.networking.k8s.io/v1": {"inferencepools": "InferencePool"},
    "leaderworkerset.x-k8s.io/v1": {"leaderworkersets": "LeaderWorkerSet"},
    "keda.sh/v1alpha1": {"scaledobjects": "ScaledObject"},
}
VERSION = "1.34"
_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_PLACE = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>status|log))?"
)


class ApiError(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class KubernetesApi:
    """`with KubernetesApi() as api: helm ... --kube-apiserver api.url`"""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str | None, str], Object] = {}
        self.rollouts: dict[str, list[Object]] = {}
        self.version = 100
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        ThreadingHTTPServer.daemon_threads = True
        handler = type("Handler", (_Handler,), {"api": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "KubernetesApi":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def of_kind(self, kind: str) -> list[Object]:
        return [item for item in self.objects.values() if item["kind"] == kind]

    def store(self, place: "_Place", body: Object, patch: bool, dry: bool) -> tuple[int, Object]:
        """Create, replace or (with `patch`) merge one object; status code and object."""
        with self.lock:
            old = self.objects.get(place.key)
            new = _merge(copy.deepcopy(old), body) if old is not None and patch else body
            kind = RESOURCES[place.group][place.plural]
            if old is not None and kind == "Deployment" and old["spec"]["selector"] != new["spec"]["selector"]:
                raise ApiError(422, "Invalid", "spec.selector: Invalid value: field is immutable")
            _check(new)
            self.version += 1
            metadata = new["metadata"]
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
            metadata |= {"resourceVersion": str(self.version), "generation": 1, "namespace": place.namespace or ""}
            if not dry:
                self.objects[place.key] = new
                self._control(place, new)
            return (200 if old else 201), new

    def _control(self, place: "_Place", item: Object) -> None:
        """What controllers and kubelets would do, done at once."""
        if item["kind"] == "Pod":
            item["status"] = {"phase": "Succeeded"}
        if item["kind"] == "Job":
            item["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
        if item["kind"] == "Deployment":
            name, template = item["metadata"]["name"], item["spec"]["template"]
            history = self.rollouts.setdefault(name, [])
            if not history or history[-1] != template:
                history.append(copy.deepcopy(template))
            count = item["spec"].get("replicas", 1)
            counts = dict.fromkeys(("replicas", "readyReplicas", "availableReplicas", "updatedReplicas"), count)
            conditions = [
                {"type": "Available", "status": "True"},
                {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
            ]
            item["status"] = {"observedGeneration": 1, "conditions": conditions} | counts
            item["metadata"].setdefault("annotations", {})["deployment.kubernetes.io/revision"] = "1"
            self.objects["apps/v1", "replicasets", place.namespace, f"{name}-rs"] = {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {
                    "name": f"{name}-rs",
                    "namespace": place.namespace,
                    "labels": template["metadata"]["labels"],
                    "ownerReferences": [
                        {
                            "apiVersion": "apps/v1",
                            "kind": "Deployment",
                            "name": name,
                            "uid": item["metadata"]["uid"],
                            "controller": True,
                        }
                    ],
                },
                "spec": {"selector": item["spec"]["selector"], "template": template},
                "status": {"replicas": count, "readyReplicas": count},
            }

    def remove(self, place: "_Place") -> None:
        with self.lock:
            if self.objects.pop(place.key, None) is None:
                raise ApiError(404, "NotFound", f'{place.plural} "{place.name}" not found')
            if place.plural == "deployments":
                self.objects.pop(("apps/v1", "replicasets", place.namespace, f"{place.name}-rs"), None)

    def select(self, place: "_Place", query: dict[str, str]) -> list[Object]:
        items = [
            item
            for (group, plural, namespace, _), item in self.objects.items()
            if (group, plural) == (place.group, place.plural) and place.namespace in (None, namespace)
        ]
        for field in filter(None, query.get("fieldSelector", "").split(",")):
            key, _, value = field.partition("=")
            if key == "metadata.name":
                items = [item for item in items if item["metadata"]["name"] == value]
        for label in filter(None, query.get("labelSelector", "").split(",")):
            key, _, value = label.replace("==", "=").partition("=")
            items = [item for item in items if item["metadata"].get("labels", {}).get(key) == value]
        return items


class _Place:
    """What a path names."""

    def __init__(self, path: str) -> None:
        match = _PLACE.fullmatch(path)
        if match is None:
            raise ApiError(404, "NotFound", f"nothing at {path}")
        self.group = match["core"] or match["group"]
        self.namespace, self.plural, self.name, self.sub = (match[n] for n in ("namespace", "plural", "name", "sub"))
        if self.plural not in RESOURCES.get(self.group, {}):
            raise ApiError(404, "NotFound", f"no resource at {path}")

    @property
    def key(self) -> tuple[str, str, str | None, str]:
        assert self.name is not None
        return self.group, self.plural, self.namespace, self.name


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: KubernetesApi

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query))
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = address.path.rstrip("/")
        try:
            found = _discovery(path)
            if found is not None:
                self._answer(200, found)
            elif self.command == "GET":
                self._get(_Place(path), query)
            elif self.command == "DELETE":
                self.api.remove(_Place(path))
                self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
            else:
                self._write(_Place(path), raw, "dryRun" in query)
        except ApiError as error:
            status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
            details = {"message": str(error), "reason": error.reason, "code": error.code}
            self._answer(error.code, status | details)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

    def _get(self, place: _Place, query: dict[str, str]) -> None:
        if place.name is not None:
            if place.key not in self.api.objects:
                raise ApiError(404, "NotFound", f'{place.plural} "{place.name}" not found')
            if place.sub == "log":
                self._answer(200, f"log of {place.name}\n".encode())
            else:
                self._answer(200, self.api.objects[place.key])
        elif query.get("watch") in ("true", "1"):
            self._watch(place, query)
        else:
            metadata = {"resourceVersion": str(self.api.version)}
            kind = f"{RESOURCES[place.group][place.plural]}List"
            head = {"kind": kind, "apiVersion": place.group, "metadata": metadata}
            self._answer(200, head | {"items": self.api.select(place, query)})

    def _watch(self, place: _Place, query: dict[str, str]) -> None:
        """What is there now, and nothing more: all changes are done by then."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        events = [{"type": "ADDED", "object": item} for item in self.api.select(place, query)]
        if query.get("sendInitialEvents") == "true":
            annotations = {"k8s.io/initial-events-end": "true"}
            metadata = {"resourceVersion": str(self.api.version), "annotations": annotations}
            kind = RESOURCES[place.group][place.plural]
            mark = {"kind": kind, "apiVersion": place.group, "metadata": metadata}
            events.append({"type": "BOOKMARK", "object": mark})
        for event in events:
            self.wfile.write(json.dumps(event).encode() + b"\n")
        self.wfile.flush()
        self.api.stopped.wait(5)  # clients complain about a watch that ends at once
        self.close_connection = True

    def _write(self, place: _Place, raw: bytes, dry: bool) -> None:
        body = _from_protobuf(raw) if raw[:4] == b"k8s\0" else yaml.safe_load(raw)
        place.name = place.name or body["metadata"]["name"]
        exists = place.key in self.api.objects
        apply = "apply" in self.headers.get("Content-Type", "")
        if self.command == "POST" and exists:
            raise ApiError(409, "AlreadyExists", f'{place.plural} "{place.name}" already exists')
        if self.command == "PATCH" and not exists and not apply:
            raise ApiError(404, "NotFound", f'{place.plural} "{place.name}" not found')
        self._answer(*self.api.store(place, body, self.command == "PATCH" and not apply, dry))


# The keys by which Kubernetes merges lists of objects; other lists are replaced.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
}


def _merge(old: Object, patch: Object) -> Object:
    """A JSON merge patch or a strategic merge patch; as much of it as helm sends for the chart."""
    for key, value in patch.items():
        if key == "$retainKeys":
            for name in set(old) - set(value):
                del old[name]
        elif key.startswith("$"):
            continue
        elif value is None:
            old.pop(key, None)
        elif isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value)
        elif isinstance(value, list) and isinstance(old.get(key), list) and _merge_key(key, value + old[key]):
            old[key] = _merge_list(_merge_key(key, value + old[key]), old[key], value)
        else:
            old[key] = value
        order = patch.get(f"$setElementOrder/{key}")
        if order is not None and (by := _merge_key(key, order)):
            place = {item[by]: number for number, item in enumerate(order)}
            old[key].sort(key=lambda item: place[item[by]])
    return old


def _merge_key(key: str, items: list[Any]) -> str:
    """The merge key of a list, or nothing for one that is replaced."""
    if key == "ports":
        return "containerPort" if "containerPort" in items[0] else "port"
    return _MERGE_KEYS.get(key, "")


def _merge_list(by: str, old: list[Object], patch: list[Object]) -> list[Object]:
    merged = {item[by]: item for item in old}
    for item in patch:
        if item.get("$patch") == "delete":
            merged.pop(item[by], None)
        else:
            merged[item[by]] = _merge(merged.get(item[by], {}), item)
    return list(merged.values())


def _check(item: Object) -> None:
    sent = copy.deepcopy(item)
    sent.pop("status", None)
    sent["metadata"].pop("managedFields", None)
    try:
        check_object(sent, VERSION)
    except Exception as error:
        raise ApiError(422, "Invalid", f"{type(error).__name__}: {error}"[:300]) from None


def _discovery(path: str) -> Any | None:
    """The answers by which a client learns what the API has."""
    root = {group: f"{'apis' if '/' in group else 'api'}/{group}" for group in RESOURCES}
    if path == "/version":
        return {"major": "1", "minor": VERSION.split(".")[1], "gitVersion": f"v{VERSION}.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for group in RESOURCES:
            name, _, version = group.rpartition("/")
            if name:
                versions = {"groupVersion": group, "version": version}
                groups.append({"name": name, "versions": [versions], "preferredVersion": versions})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        return {"paths": {place: {"serverRelativeURL": f"/openapi/v3/{place}"} for place in root.values()}}
    for group, place in root.items():
        if path == f"/{place}":
            return _resource_list(group)
        if path == f"/openapi/v3/{place}":
            return _openapi(group, place)
    return None


def _resource_list(group: str) -> Any:
    resources = [
        {
            "name": plural,
            "singularName": kind.lower(),
            "namespaced": kind != "Namespace",
            "kind": kind,
            "verbs": _VERBS,
        }
        for plural, kind in RESOURCES[group].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}


def _openapi(group: str, place: str) -> Any:
    """Says that the server validates fields, so that helm leaves it to us."""
    name, _, version = group.rpartition("/")
    paths = {}
    for plural, kind in RESOURCES[group].items():
        base = f"/{place}" + ("" if kind == "Namespace" else "/namespaces/{namespace}") + f"/{plural}"
        operation = {
            "responses": {"200": {"description": "OK"}},
            "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
            "x-kubernetes-group-version-kind": {"group": name, "version": version, "kind": kind},
        }
        paths[base + "/{name}"] = {"patch": operation | {"x-kubernetes-action": "patch"}}
        paths[base] = {"post": operation | {"x-kubernetes-action": "post"}}
    info = {"title": "Kubernetes", "version": f"v{VERSION}.0"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}


# helm stores its releases through client-go, which writes these kinds as protocol buffers. Field numbers: Unknown
# (typeMeta 1, raw 2), TypeMeta (apiVersion 1, kind 2), ObjectMeta (name 1, labels 11), Secret (data 2, type 3).


def _fields(content: bytes) -> list[tuple[int, Any]]:
    found = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(content):
        tag = varint()
        if tag & 7 == 0:
            found.append((tag >> 3, varint()))
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or varint()
        found.append((tag >> 3, content[at : at + size]))
        at += size
    return found


def _map(fields: list[tuple[int, Any]], number: int) -> dict[str, bytes]:
    entries = [dict(_fields(value)) for field, value in fields if field == number]
    return {entry[1].decode(): entry.get(2, b"") for entry in entries}


def _from_protobuf(raw: bytes) -> Object:
    envelope = dict(_fields(raw[4:]))
    kind = {number: value.decode() for number, value in _fields(envelope[1])}
    fields = _fields(envelope[2])
    metadata = _fields(dict(fields)[1])
    labels = {name: value.decode() for name, value in _map(metadata, 11).items()}
    item: Object = {
        "apiVersion": kind[1],
        "kind": kind[2],
        "metadata": {"name": dict(metadata)[1].decode(), "labels": labels},
    }
    if kind[2] == "Secret":
        item["data"] = {name: base64.b64encode(value).decode() for name, value in _map(fields, 2).items()}
        item["type"] = dict(fields).get(3, b"Opaque").decode()
    elif kind[2] == "ConfigMap":
        item["data"] = {name: value.decode() for name, value in _map(fields, 2).items()}
    elif kind[2] != "Namespace":
        raise ApiError(415, "UnsupportedMediaType", f"{kind[2]} as protocol buffer")
    return item
