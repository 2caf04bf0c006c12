#: title What cannot be served fails xl create within 2 s with a reason that can be read
#: needs platter.elf
# Would miss: reasons that only a certain format has; those are the formats' own scenarios.

scenario() {
    make_image good.raw 16M
    make_image empty.raw 0
    mkdir "$IMAGES/folder"
    echo secret >/srv/outside.raw
    ln -s /srv/outside.raw "$IMAGES/link.raw"
    create_storage
    expect_refused /images/missing.raw 'missing\.raw.*(no such|not found|does not exist|missing)'
    expect_refused /images/folder 'folder.*(directory|regular file)'
    expect_refused /nostore/good.raw 'nostore'
    expect_refused /images/good.raw,colour=blue 'colour'
    expect_refused /images/empty.raw 'empty\.raw.*(empty|zero|length|0 (bytes|sectors))'
    expect_refused /images/../outside.raw '\.\.'
    expect_refused good.raw 'good\.raw'
    expect_refused '/images/good.raw,format=nosuch' 'nosuch'
    step "a good one still works after all that"
    hold good "$(disk xvda good.raw)"
    xl destroy good
    no_backends
}
