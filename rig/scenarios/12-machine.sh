#: title The machine layer checks itself under Xen; a crash of any kind is reported
#: needs probe.elf
# Would miss: facilities that only two domains together can use, and anything about speed.

. /job/dom0/loadgen.sh

# Ways to die, and what the console then says; a stack that overflows has nowhere to say it.
CRASHES="
null       page fault at address 0x8
text       page fault
rodata     page fault
exec       page fault
execstack  page fault
opcode     invalid opcode
panic      index out of bounds
panicpanic crashed again while reporting
panicfault crashed again while reporting
logpanic   inside a log line
memory     capacity overflow|allocation|heap
forged     a region that was not given out
beyond     access beyond its region
stale      a region that was not given out
granted    freed frames that are still granted"

scenario() {
    start_bare check probe check
    within "$PATIENCE" console_has check "all checks passed|crash" || fail "the checks do not end"
    console_has check "all checks passed" || fail "$(console_of check | tail -n5)"
    within 30 domain_is_gone check || fail "check did not switch itself off"
    while read -r way words; do
        [ -n "$way" ] || continue
        start_bare "$way" probe "$way"
        within "$PATIENCE" has_crashed "$way" || fail "$way: the domain did not crash"
        console_has "$way" "still alive" && fail "$way: it is still alive"
        console_has "$way" "crash: " || fail "$way: no report on the console"
        console_has "$way" "$words" || fail "$way: $(console_of "$way" | tail -n9)"
        xl destroy "$way"
    done <<EOF
$CRASHES
EOF
    start_bare stack probe stack
    within "$PATIENCE" has_crashed stack || fail "stack: the domain did not crash"
    xl destroy stack
}

has_crashed() { xl list "$1" | awk 'NR == 2 && $5 ~ /c/ { found = 1 } END { exit !found }'; }
