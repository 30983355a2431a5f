import torch

from rightbatch.engine.late_values import LateValues


def vector(value):
    return torch.full((2,), value, dtype=torch.float64)


def test_values_on_the_host_are_there_at_once_and_in_order():
    late = LateValues()
    for value in (1.0, 2.0):
        late.put(vector(value))

    assert late.take(wait=False) == [[1.0, 1.0], [2.0, 2.0]]
    assert late.take(wait=True) == []


def test_an_event_holds_back_its_vector_and_those_behind_it_until_they_are_waited_for():
    class Event:
        arrived = False

        def query(self):
            return self.arrived

        def synchronize(self):
            self.arrived = True

    late, event = LateValues(), Event()
    late._waiting.append((vector(1.0), event))
    late.put(vector(2.0))

    assert late.take(wait=False) == []
    assert late.take(wait=True) == [[1.0, 1.0], [2.0, 2.0]]
    assert event.arrived


def test_a_device_that_cannot_tell_is_waited_for_only_when_too_much_piles_up():
    class OnDevice:
        device = torch.device("mps")

        def tolist(self):
            return [0.0]

    late = LateValues()
    for _ in range(256):
        late._waiting.append((OnDevice(), None))

    assert late.take(wait=False) == []
    late._waiting.append((OnDevice(), None))
    assert len(late.take(wait=False)) == 1
    assert len(late.take(wait=True)) == 256
