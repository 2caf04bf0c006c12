#: title Two queues, 16 pages, 32 segments, for a minute: every sector checked
#: needs platter.elf loadgen.elf
#: set slow
#: timeout 900
# The long form of 300; would miss what that one would miss.

SECS=60
. /job/scenarios/300-loadgen-queues.sh
