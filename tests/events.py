"""Reads TensorBoard's event files, as TensorBoard does."""

import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog


def read(directory):
  """The events with values of a run, without what a later file makes void."""
  found = []
  for path in sorted(directory.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while len(data) >= 12:
      end = 12 + struct.unpack("<Q", data[:8])[0]
      if len(data) < end + 4:
        break  # cut short
      event, data = Event.FromString(data[12:end]), data[end + 4 :]
      if event.session_log.status == SessionLog.START:
        found = [old for old in found if old.step < event.step]
      elif event.HasField("summary"):
        found.append(event)
  return found
