"""Models of RecBole 1.2.1 on our split: see third_party/driver.py."""

from third_party import driver

PEER = driver.Peer(
  "RecBole", "recbole", "1.2.1", driver.PEERS / "recbole_worker.py"
)

if __name__ == "__main__":
  driver.launch(PEER)
