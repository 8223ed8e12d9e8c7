"""A converter for workers that are to die; apart from the errands, which are quick to import."""

from __future__ import annotations

from pathlib import Path

from quantrecipe.converter import ErrorSums, Job
from quantrecipe.converter.streaming import StreamingConverter
from quantrecipe.schema.plan import PlannedOther
from tests.converter.errands import die


class Dying(StreamingConverter):
    """The streaming converter; its process is killed in the middle of the sixth unit, once."""

    def convert(self, job: Job) -> ErrorSums | None:
        if job.unit.index != 5:
            return super().convert(job)
        of = job.unit.of
        info = of.source if isinstance(of, PlannedOther) else of.source.tensors["weight"]
        mark = Path(str(info.file)).with_name("died")
        if mark.exists():
            return super().convert(job)
        role = next(iter(job.unit.ranges()))
        job.write(role, memoryview(bytearray(job.unit.ranges()[role].nbytes // 2)))
        mark.touch()
        die()
        raise AssertionError("dead by now")
