"""A stand-in for W&B's server on loopback: what `wandb sweep` and `wandb agent` ask of it.

It keeps the sweep that is created, and hands out the trials it is given, one at a time. The runs
themselves log offline (WANDB_MODE), so that nothing else is needed.
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
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def answer(self, query, variables):
        project = {"id": "p", "name": variables.get("projectName"), "entity": {}}
        project["entity"] = {"id": "e", "name": "someone"}
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
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.answer(asked.get("query", ""), asked.get("variables") or {})
        content = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass
