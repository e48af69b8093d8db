"""A stand-in for W&B's server on loopback: what `wandb sweep` and `wandb agent` ask of it, and what
an online run does.

It keeps the sweep that is created, and hands out the trials it is given, one at a time. Of runs it
keeps the names and the lines of their history. It can fail: see `fault`.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SWEEP = "sweep123"


class WandbServer(ThreadingHTTPServer):
    """with WandbServer([{"learning_rate": 0.001}, ...]) as server: ... server.url, server.sweeps"""

    def __init__(self, trials):
        super().__init__(("127.0.0.1", 0), Handler)
        self.waiting = [{"run_id": f"run{n}", "args": args} for n, args in enumerate(trials)]
        self.sweeps = []  # configurations, as YAML
        self.runs = []  # names
        self.history = []  # lines, as JSON
        self.fault = None  # "silent" takes requests and does not answer; a number is a status
        self.later = None  # what `fault` becomes once a run is open
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def answer(self, query, variables):
        project = {"id": "p", "name": variables.get("projectName"), "entity": {}}
        project["entity"] = {"id": "e", "name": "someone"}
        if "upsertBucket" in query:
            self.runs.append(variables["name"])
            self.fault = self.later
            bucket = {"id": "b", "name": variables["name"], "displayName": "it", "config": "{}"}
            bucket |= {"description": "", "sweepName": None, "historyLineCount": 0}
            project["name"] = variables["project"]
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "upsertSweep" in query:
            self.sweeps.append(variables["config"])
            sweep = {"name": SWEEP, "project": project}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if "SweepWithRuns" in query:
            sweep = {"id": "s", "name": SWEEP, "state": "RUNNING", "runs": {"edges": []}}
            return {"project": {"sweep": sweep | {"config": self.sweeps[-1]}}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "a"}}}
        if "agentHeartbeat" in query:
            is_busy, commands = json.loads(variables["runState"]), []
            if not is_busy:
                commands = [{"type": "exit"}]
                if self.waiting:
                    run = self.waiting.pop(0)
                    args = {name: {"value": value} for name, value in run["args"].items()}
                    commands = [{"type": "run", "program": "vit.py", **run, "args": args}]
            agent = {"agent": {"id": "a"}, "commands": json.dumps(commands)}
            return {"agentHeartbeat": agent}
        if "viewer" in query:
            nobody = {"edges": []}
            viewer = {"id": "v", "name": "Someone", "username": "someone", "entity": "someone"}
            viewer |= {"email": "", "admin": False, "flags": "{}", "teams": nobody}
            return {"viewer": viewer | {"apiKeys": nobody, "deletedAt": None}, "serverInfo": None}
        return {}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, answer = self.server.fault, {}
        if fault == "silent":
            self.server.ended.wait(60)
            return
        if fault:
            self.send(fault, b"")
            return
        if self.path == "/graphql":
            asked = json.loads(content)
            variables = asked.get("variables") or {}
            answer = {"data": self.server.answer(asked.get("query", ""), variables)}
        elif self.path.endswith("/file_stream"):
            files = json.loads(content).get("files") or {}
            self.server.history += files.get("wandb-history.jsonl", {}).get("content", [])
        self.send(200, json.dumps(answer).encode())

    do_GET = do_PUT = do_POST

    def send(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass
