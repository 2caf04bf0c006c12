# Reads jobs from the console and runs them one at a time, for ever; sourced by an init.
#
# A job is a line "ID BASE64"; the text between "@@begin ID" and "@@done ID STATUS" is its output.
# Markers stand alone on a line, so kernel messages in between do no harm.
printf '\n@@ready %s\n' "$(cut -d' ' -f1 /proc/uptime)"
while read -r id job; do
    [ -n "$job" ] || continue
    echo "$job" | base64 -d >"/tmp/job.$id"
    printf '\n@@begin %s\n' "$id"
    sh "/tmp/job.$id" </dev/null
    printf '\n@@done %s %s\n' "$id" "$?"
done
