"""The decision: from estimates, a goal and constraints to a batch size that can be used. Pure, and repeatable from a saved run."""

from rightbatch.recommend.decision import recommend
from rightbatch.recommend.judgement import judge

__all__ = ["judge", "recommend"]
