"""What a conversion would be, without making anything: read the headers, measure one expert, say so."""

import os

from expertd.convert.checkpoint import CheckpointFiles, check_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.estimate import measured_seconds
from expertd.convert.forecast import forecast_text
from expertd.convert.interruption import interruption
from expertd.convert.memory import crew_of
from expertd.convert.plan import plan_store


def forecast(files: CheckpointFiles, config: QuantizeConfig, *, n_jobs: int | None) -> str:
    """Return what a person wants to know before it is done; raise ConvertError."""
    source = check_checkpoint(files)
    plan = plan_store(source, config)
    crew = crew_of(plan, source, n_asked=n_jobs, n_processors=len(os.sched_getaffinity(0)))
    with interruption() as asked:
        seconds = measured_seconds(plan, config, crew.n_jobs, asked)
    is_fetched = files.fetch_job(None) is not None
    return forecast_text(files.place, source, config, crew=crew, seconds=seconds, is_fetched=is_fetched)
