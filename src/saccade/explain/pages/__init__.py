"""What `saccade explain` shows: photos under several methods on one page, and whether to believe what is seen there.

`examine` explains and tests, `write_page` draws what it found; pages of other commands are built on the same template.
"""

from saccade.explain.pages.examine import Effort, examine
from saccade.explain.pages.page import judge, write_page

__all__ = ["Effort", "examine", "judge", "write_page"]
