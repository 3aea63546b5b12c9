"""The host's resolver inside hook jobs, if it listens on a loopback that they have not; on the agent's event loop."""

from acctd.agent import Agent
from acctd.errors import AcctdError
from acctd.job import Job
from acctd.network import resolver


class Relays:
    """The jobs' relays, by id."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._relays: dict[str, resolver.Relay] = {}

    def open(self, job: Job) -> None:
        """Relay for a job, anew if its pipe was moved. What cannot be had is said in its notes."""
        self.close(job.spec.id)
        if job.spec.network != "nat" or not (servers := resolver.host_servers()):
            return
        try:
            with self._agent.inside(job) as namespace:
                relay = resolver.Relay(namespace, servers)
        except (AcctdError, OSError) as e:
            job.note(f"the host's resolver does not answer inside the job: {e}")
            return
        for server, why in relay.skipped:
            job.note(f"the resolver {server} does not answer inside the job: {why}")
        relay.serve()
        self._relays[job.spec.id] = relay

    def close(self, name: str) -> None:
        """Nothing there is fine."""
        if (relay := self._relays.pop(name, None)) is not None:
            relay.close()

    def close_all(self) -> None:
        """The agent goes; the jobs are without the host's resolver until the next one comes."""
        for name in list(self._relays):
            self.close(name)
