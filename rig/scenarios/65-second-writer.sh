#: title One image has one writer or many readers, never both
#: needs platter.elf
# Would miss: a writer in another storage domain, which no lock of this one can see.

scenario() {
    make_image disk.raw 16M
    create_storage
    create_guest writer "$(disk xvda disk.raw)"
    guest_must writer 'echo mine | dd of=/dev/xvda conv=fsync 2>/dev/null'
    expect_refused /images/disk.raw 'in use'
    expect_refused /images/disk.raw 'in use' r
    step "the first writer is not disturbed"
    guest_must writer '[ "$(head -n1 /dev/xvda)" = mine ]'
    xl destroy writer
    step "two readers"
    hold reader1 "$(disk xvda disk.raw r)"
    hold reader2 "$(disk xvda disk.raw r)"
    expect_refused /images/disk.raw 'in use'
    xl destroy reader1
    xl destroy reader2
    step "a writer again"
    hold writer2 "$(disk xvda disk.raw)"
    xl destroy writer2
    no_backends
}
