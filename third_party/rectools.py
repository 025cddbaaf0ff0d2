"""Models of RecTools 0.19 on our split: see third_party/driver.py."""

from third_party import driver

PEER = driver.Peer(
  "RecTools", "rectools", "0.19", driver.PEERS / "rectools_worker.py"
)

if __name__ == "__main__":
  driver.launch(PEER)
