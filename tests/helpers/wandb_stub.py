"""Minimal in-process W&B backend for integration tests (stdlib only). Speaks enough GraphQL + file_stream for
wandb-core 0.31: init, log, resume, files, finish, `wandb sync`, and Api().run(s)/history."""
from __future__ import annotations

import base64
import gzip
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def worded(value):
    """As W&B's server answers what is no number in JSON: "NaN", "Infinity"."""
    if isinstance(value, dict): return {k: worded(v) for k, v in value.items()}
    if isinstance(value, list): return [worded(v) for v in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value

class WandbStub:
    def __init__(self, port: int = 0, entity: str = "stub"):
        self.entity, self.runs, self.requests, self.unknown, self.lock, self.fail_with = entity, {}, [], [], threading.Lock(), None
        stub, self.storage = self, {}
        class H(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def _go(self): stub._handle(self)
            do_GET = do_POST = do_PUT = do_HEAD = _go
            def log_message(self, *a): pass
        class Server(ThreadingHTTPServer): request_queue_size = 128  # a picture of a table beyond 5 at once would wait a second or three
        self.srv = Server(("127.0.0.1", port), H); self.srv.daemon_threads = True; self.srv.handle_error = lambda *a: None
        self.url = f"http://127.0.0.1:{self.srv.server_port}"
    def __enter__(self): threading.Thread(target=self.srv.serve_forever, daemon=True).start(); return self
    def __exit__(self, *a): self.srv.shutdown(); self.srv.server_close()
    @property
    def env(self):
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online",
                "WANDB_ERROR_REPORTING": "false", "WANDB_ENTITY": self.entity}
    # ---- http
    def _handle(self, h):
        body = h.rfile.read(int(h.headers.get("Content-Length") or 0))
        if h.headers.get("Content-Encoding") == "gzip": body = gzip.decompress(body)
        if self.fail_with:  # simulate an outage
            h.send_response(self.fail_with); h.send_header("Content-Length", "0"); h.end_headers(); return
        code, out = 200, {}
        with self.lock:
            self.requests.append((h.command, h.path))
            if h.path.startswith("/graphql"):
                q = json.loads(body); op = q.get("operationName") or (re.findall(r"(?:query|mutation)\s+(\w+)", q["query"]) or ["?"])[0]
                self.requests[-1] += (op,)
                f = getattr(self, "op_" + op, None)
                if f: out = {"data": f(q.get("variables") or {}, q["query"])}
                else: self.unknown.append((op, q)); out = {"data": None, "errors": [{"message": f"stub: unknown op {op}"}]}
            elif m := re.match(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", h.path):
                self._stream(self._run(m[3], m[2], m[1]), json.loads(body)); out = {"exitcode": None, "limits": {}}
            elif m := re.match(r"/artifact/([^/]+)/(.+)", h.path): self.storage[m[1], m[2]] = body
            elif m := re.match(r"/storage/([^/]+)/(.+)", h.path):
                r = self.runs[m[1]]
                if h.command == "PUT": r["files"][m[2]] = body
        data = json.dumps(worded(out)).encode()
        h.send_response(code); h.send_header("Content-Type", "application/json"); h.send_header("Content-Length", str(len(data)))
        h.end_headers(); h.wfile.write(data)
    def _run(self, name, project=None, entity=None):
        return self.runs.setdefault(name, dict(id=base64.b64encode(f"Run:v1:{name}".encode()).decode(), name=name, project=project,
            entity=entity or self.entity, displayName=name, config={}, summary={}, history={}, events={}, output={}, files={}, tags=[],
            group=None, jobType=None, notes=None, sweep=None, state="running", upserts=0, exitcode=None, resumed=0, preempting=False))
    def _stream(self, r, b):
        for fn, c in (b.get("files") or {}).items():
            tgt = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events", "output.log": "output"}.get(fn)
            if fn == "wandb-summary.json": r["summary"] = json.loads(c["content"][-1])
            elif tgt:
                for i, line in enumerate(c["content"]): r[tgt][c["offset"] + i] = line
        if b.get("preempting"): r["preempting"] = True
        if b.get("complete"): r["exitcode"] = b.get("exitcode"); r["state"] = "finished" if b.get("exitcode") == 0 else "preempted" if r["preempting"] else "failed"
    def history(self, name): return [json.loads(v) for _, v in sorted(self.runs[name]["history"].items())]
    def _bucket(self, r):
        return dict(id=r["id"], name=r["name"], displayName=r["displayName"], description="", config=json.dumps(r["config"]), sweepName=r["sweep"],
                    project=dict(id="UHJvag==", name=r["project"], entity=dict(id="RW50", name=r["entity"])), historyLineCount=len(r["history"]))
    # ---- graphql (client -> server while logging)
    def op_Viewer(self, v, q): return {"viewer": dict(id="VXNlcjox", entity=self.entity, username=self.entity, email="a@b.c", flags='{"code_saving_enabled": true}', teams=dict(edges=[dict(node=dict(name=self.entity))]), admin=False, apiKeys=dict(edges=[]))}
    def op_OrganizationCoreWeaveOrganizationID(self, v, q): return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
    def op_ServerFeaturesQuery(self, v, q): return {"serverInfo": {"features": []}}
    def op_ServerInfo(self, v, q): return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}
    def op_RunResumeStatus(self, v, q):
        r = self.runs.get(v["name"])
        if not r: return {"model": {"id": "UHJvag==", "name": v["project"], "entity": {"id": "RW50", "name": self.entity}, "bucket": None}}
        r["resumed"] += 1; hist, ev = [r["history"][k] for k in sorted(r["history"])], [r["events"][k] for k in sorted(r["events"])]
        return {"model": {"id": "UHJvag==", "name": v["project"], "entity": {"id": "RW50", "name": self.entity}, "bucket": {"id": r["id"], "name": r["name"],
            "summaryMetrics": json.dumps(r["summary"]), "displayName": r["displayName"], "logLineCount": len(r["output"]), "historyLineCount": len(hist), "eventsLineCount": len(ev),
            "historyTail": json.dumps(hist[-1:]), "eventsTail": json.dumps(ev[-1:]), "config": json.dumps(r["config"]), "tags": r["tags"], "wandbConfig": json.dumps({"t": {}})}}}
    def op_UpsertBucket(self, v, q):
        new = v["name"] not in self.runs; r = self._run(v["name"], v.get("project"), v.get("entity")); r["upserts"] += 1
        for src, dst in (("displayName", "displayName"), ("groupName", "group"), ("jobType", "jobType"), ("notes", "notes"), ("tags", "tags"), ("sweep", "sweep"), ("state", "state")):
            if v.get(src) is not None: r[dst] = v[src]
        if v.get("config"): r["config"].update(json.loads(v["config"]))
        return {"upsertBucket": {"bucket": self._bucket(r), "inserted": new}}
    def op_CreateRunFiles(self, v, q):
        r = self._run(v["run"], v["project"], v["entity"])
        return {"createRunFiles": {"runID": r["id"], "uploadHeaders": [], "files": [{"name": f, "uploadUrl": f"{self.url}/storage/{r['name']}/{f}"} for f in v["files"]]}}
    def op_RunStoppedStatus(self, v, q): return {"project": {"run": {"stopped": False}}}
    # ---- graphql (public API: wandb.Api().runs / run / history)
    def _node(self, r):
        return dict(id=r["id"], projectId="1", tags=r["tags"], name=r["name"], displayName=r["displayName"], sweepName=r["sweep"], state=r["state"], config=json.dumps(r["config"]),
            group=r["group"], jobType=r["jobType"], commit=None, readOnly=False, createdAt="2026-01-01T00:00:00Z", heartbeatAt="2026-01-01T00:00:00Z", description="", notes=r["notes"],
            systemMetrics="{}", summaryMetrics=json.dumps(worded(r["summary"])), historyLineCount=len(r["history"]), user=dict(name=self.entity, username=self.entity),
            historyKeys={"lastStep": len(r["history"]) - 1, "keys": {}})
    def op_Runs(self, v, q):
        edges = [dict(node=self._node(r), cursor=r["name"]) for r in self.runs.values() if r["project"] == v["project"]]
        return {"project": dict(internalId="1", runCount=len(edges), readOnly=False, runs=dict(edges=edges, pageInfo=dict(endCursor=None, hasNextPage=False)))}
    def op_Run(self, v, q):
        r = self.runs.get(v["name"]); return {"project": {"run": self._node(r) if r else None}}
    op_LightweightRun = op_GetLightweightRun = op_Run
    def op_RunHistoryKeys(self, v, q): return {"project": {"run": {"historyKeys": self._node(self.runs[v["name"]])["historyKeys"]}}}
    def op_RunSampledHistory(self, v, q):
        out = []
        for spec in map(json.loads, v["specs"]):
            ks = spec["keys"]; rows = [{k: h[k] for k in ks} for h in self.history(v["name"]) if all(k in h for k in ks)]
            n = spec.get("samples", 500); out.append(rows[:: max(1, len(rows) // n)])
        return {"project": {"run": {"sampledHistory": out}}}
    def op_RunParquetHistory(self, v, q):
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": self.history(v["runName"])}}}}
    def op_ProjectInternalId(self, v, q): return {"project": {"id": "UHJvag==", "internalId": "1"}}
    # ---- reports / workspaces (wandb-workspaces)
    def op_UpsertView2(self, v, q):
        self.views = getattr(self, "views", []); self.views.append(v)
        node = dict(id=base64.b64encode(f"View:{len(self.views)}".encode()).decode(), name=v.get("name"), type=v.get("type"), displayName=v.get("displayName"), description=v.get("description"),
                    spec=v.get("spec"), createdAt="2026-01-01T00:00:00Z", updatedAt="2026-01-01T00:00:00Z", project=dict(id="UHJvag==", name=v.get("projectName"), entityName=v.get("entityName")),
                    user=None, entityName=v.get("entityName"))
        return {"upsertView": {"view": node, "inserted": True}}
    op_upsertView = op_UpsertView = op_UpsertView2
    def op_SampledHistoryPage(self, v, q):
        s = json.loads(v["spec"]); ks = s.get("keys") or []
        rows = [h for h in self.history(v["run"]) if s.get("minStep", 0) <= h["_step"] < s.get("maxStep", 1 << 60) + 1 and all(k in h for k in ks)]
        return {"project": {"run": {"sampledHistory": [[{k: h[k] for k in (ks or h)} for h in rows]]}}}
    def op_HistoryPage(self, v, q):
        return {"project": {"run": {"history": [json.dumps(h) for h in self.history(v["run"]) if v["minStep"] <= h["_step"] < v["maxStep"]]}}}
    def op_GetProjects(self, v, q):
        names = sorted({r["project"] for r in self.runs.values()})
        return {"models": {"pageInfo": dict(__typename="PageInfo", endCursor=None, hasNextPage=False), "edges": [{"node": dict(__typename="Project", id="UHJvag==", name=n, entityName=self.entity, createdAt="2026-01-01T00:00:00Z", isBenchmark=False, user=None)} for n in names]}}
    # ---- artifacts (files in .storage) and sweeps (grid handed out in order)
    def op_ArtifactType(self, v, q): return {"project": {"artifact": None}}
    def op_CreateArtifact(self, v, q):
        self.artifacts = getattr(self, "artifacts", []); self.artifacts.append(v["input"]); i = f"QXJ0{len(self.artifacts)}"
        return {"createArtifact": {"artifact": {"id": i, "state": "PENDING", "artifactSequence": {"latestArtifact": {"id": i}}}}}
    def op_CreateArtifactManifest(self, v, q):
        return {"createArtifactManifest": {"artifactManifest": {"id": "TUE=", "file": {"id": "RkE=", "uploadUrl": f"{self.url}/artifact/{v['artifactID']}/manifest.json", "uploadHeaders": []}}}}
    def op_UpdateArtifactManifest(self, v, q):
        return {"updateArtifactManifest": {"artifactManifest": {"id": "TUE=", "file": {"id": "RkE=", "uploadUrl": f"{self.url}/artifact/QXJ0{len(self.artifacts)}/manifest.json", "uploadHeaders": []}}}}
    def op_CreateArtifactFiles(self, v, q):
        node = lambda f: dict(node=dict(id="RkI=", name=f["name"], displayName=f["name"], uploadUrl=f"{self.url}/artifact/{f['artifactID']}/{f['name']}", uploadHeaders=[], storagePath=f"a/{f['name']}",
                                        uploadMultipartUrls=None, artifact=dict(id=f["artifactID"])))
        return {"createArtifactFiles": {"files": {"edges": [node(f) for f in v["input"]["artifactFiles"]]}}}
    def op_CommitArtifact(self, v, q): return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}
    def op_ArtifactByID(self, v, q):
        a = self.artifacts[int(v["id"].removeprefix("QXJ0")) - 1]
        project = dict(id="UHJvag==", internalId="1", name=a["projectName"], entity=dict(name=a["entityName"]))
        return {"artifact": dict(__typename="Artifact", id=v["id"], artifactSequence=dict(__typename="ArtifactSequence", id="U2Vx", name=a["artifactCollectionName"], project=project),
            versionIndex=0, artifactType=dict(name=a["artifactTypeName"]), description=None, metadata=a.get("metadata"), ttlDurationSeconds=-2, ttlIsInherited=True, tags=[], historyStep=None,
            state="COMMITTED", size=1, digest=a["digest"], digestAlgorithm="MANIFEST_MD5", commitHash="c", fileCount=1, createdAt="2026-01-01T00:00:00Z", updatedAt=None, aliases=[])}
    def op_UpsertSweep(self, v, q):
        self.sweep_cfg = v["config"]; self.sweep_q = getattr(self, "sweep_q", [])
        return {"upsertSweep": {"sweep": {"name": "sw1", "project": {"id": "UHJvag==", "name": v["projectName"], "entity": {"id": "RW50", "name": self.entity}}}, "configValidationWarnings": []}}
    def op_SweepWithRuns(self, v, q):
        return {"project": {"sweep": dict(id="U3c=", name="sw1", method="grid", state="RUNNING", description="", config=self.sweep_cfg, createdAt="2026-01-01T00:00:00Z", heartbeatAt=None, updatedAt=None, earlyStopJobRunning=False, bestLoss=None, controller=None, scheduler=None, runs=dict(edges=[]))}}
    op_Sweep = op_SweepWithRuns
    def op_CreateAgent(self, v, q): return {"createAgent": {"agent": {"id": "QWc="}}}
    def op_GetSweepState(self, v, q): return {"project": {"sweep": {"state": "RUNNING"}}}
    def op_Heartbeat(self, v, q):
        running = json.loads(v["runState"] or "{}")
        cmd = [] if running else ([self.sweep_q.pop(0)] if self.sweep_q else [{"type": "exit"}])
        return {"agentHeartbeat": {"agent": {"id": "QWc="}, "commands": json.dumps(cmd)}}
