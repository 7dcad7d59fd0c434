"""A PostgreSQL server of one's own, in a folder, for as long as a test or a benchmark runs: Debian's programs, no configuration.

It listens on a Unix socket in that folder and nowhere else. PostgreSQL refuses to run as root, so root starts it as the user
`postgres` (or `nobody`), to whom the folder then belongs.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

NEEDED = ("initdb", "pg_ctl", "postgres")


def programs() -> Path | None:
    """The folder of initdb, pg_ctl and postgres: on the path, or where Debian puts the newest; None where there is none."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name.zfill(4), reverse=True)
    return next((folder for folder in folders if all((folder / name).exists() for name in NEEDED)), None)


class Postgres:
    """A running server. Its data are deleted at the end.

    Attributes:
        url: of its first database. data: the folder with everything that the server writes.

    Raises:
        FileNotFoundError: the programs are not on this machine.
        RuntimeError: the server does not start; with its log.
    """

    def __init__(self) -> None:
        folder = programs()
        if folder is None:
            raise FileNotFoundError("no PostgreSQL on this machine; on Debian: apt-get install postgresql")
        self.programs = folder
        # A path of a socket has room for 107 bytes, so not under pytest's long names.
        self.folder = Path(tempfile.mkdtemp(prefix="palate-pg-"))
        self.data, self.log = self.folder / "data", self.folder / "log"
        self.account = None
        if os.geteuid() == 0:
            accounts = {entry.pw_name: entry for entry in pwd.getpwall()}
            self.account = accounts.get("postgres", accounts["nobody"])
            os.chown(self.folder, self.account.pw_uid, self.account.pw_gid)
        name = self.account.pw_name if self.account else pwd.getpwuid(os.geteuid()).pw_name
        self.url = f"postgresql+psycopg://{name}@/postgres?host={self.folder}"
        try:
            self._run("initdb", "-D", str(self.data), "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def start(self) -> None:
        """Start it, after `stop` or `kill` too; it recovers from its log by itself."""
        settings = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c max_connections=60"
        self._run("pg_ctl", "-D", str(self.data), "-l", str(self.log), "-w", "-t", "50", "-o", settings, "start")

    def stop(self) -> None:
        """Stop it as a machine that shuts down does: connections are cut, data are written."""
        self._run("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "-t", "50", "stop")

    def kill(self) -> None:
        """Kill -9 the postmaster and wait until its children have noticed, so that `start` finds the memory free."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        children = _children(pid)
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 30
        while any(Path(f"/proc/{process}").exists() for process in [pid, *children]):
            if time.monotonic() > until:
                raise RuntimeError(f"processes of the killed server {pid} still run")
            time.sleep(0.02)

    def empty(self, name: str) -> str:
        """The URL of a new, empty schema: as good as another database, and made at once."""
        import psycopg

        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f'CREATE SCHEMA "{name}"'.encode())
        return f"{self.url}&options=-csearch_path%3D{name}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop it and delete its data."""
        try:
            self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "stop", check=False)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        account = self.account
        done = subprocess.run(
            [str(self.programs / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open in the server
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            check=False,
            timeout=120,
        )
        if check and done.returncode:
            said = self.log.read_text() if self.log.exists() else "no log"
            raise RuntimeError(f"{program} ended with {done.returncode}: {said[-2000:]}")


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found
