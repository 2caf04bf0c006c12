#!/bin/sh
# A shell for a person, on dom0's console, after the demo: everything is still running.
stty sane 2>/dev/null
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root PS1='dom0# '
cat <<'TEXT'

This is dom0 of the nested Xen. Try:
  xl list                         the domains
  xl console storage              the storage domain's console (leave it with Ctrl-])
  xl block-list guest             the guest's disks
  ls -l /srv/images               the images behind them
  exit                            switch the machine off
TEXT
setsid -c sh -i
