//! Moving bytes: the five routines that compiled code calls by name (`memcpy` and its kin), and
//! the same forward copy for memory that other domains write.
//!
//! All is one SSE2 routine of 64 bytes a turn, and not `rep movsb`: an emulator runs `rep movs`
//! byte by byte, several times slower than vector moves, and a processor gains from it only on
//! runs longer than the pages that are copied here. No AVX: a PV guest starts with XCR0 = 3.
//! [`forward`] reads each byte once and in order, which [`crate::Machine`] relies on for memory
//! that another domain can change meanwhile (copy-once). It must never be written in plain Rust:
//! the compiler would turn the loop into a call of itself, or read shared memory twice.

use core::arch::global_asm;

// to = rdi, from = rsi, length = rdx; rax returns `to`. Flags DF is clear by the ABI.
global_asm!(
    r#"
    .section .text.platter_bytes, "ax", @progbits
    .balign 16
    .type platter_forward, @function
    .globl platter_forward
platter_forward:
    mov rax, rdi
    cmp rdx, 64
    jb 3f
2:  movups xmm0, [rsi]
    movups xmm1, [rsi + 16]
    movups xmm2, [rsi + 32]
    movups xmm3, [rsi + 48]
    movups [rdi], xmm0
    movups [rdi + 16], xmm1
    movups [rdi + 32], xmm2
    movups [rdi + 48], xmm3
    add rsi, 64
    add rdi, 64
    sub rdx, 64
    cmp rdx, 64
    jae 2b
3:  cmp rdx, 16
    jb 4f
    movups xmm0, [rsi]
    movups [rdi], xmm0
    add rsi, 16
    add rdi, 16
    sub rdx, 16
    jmp 3b
    // Fewer than 16 are left: the length in binary says which sizes to move.
4:  test dl, 8
    jz 5f
    mov rcx, [rsi]
    mov [rdi], rcx
    add rsi, 8
    add rdi, 8
5:  test dl, 4
    jz 6f
    mov ecx, [rsi]
    mov [rdi], ecx
    add rsi, 4
    add rdi, 4
6:  test dl, 2
    jz 7f
    movzx ecx, word ptr [rsi]
    mov [rdi], cx
    add rsi, 2
    add rdi, 2
7:  test dl, 1
    jz 8f
    movzx ecx, byte ptr [rsi]
    mov [rdi], cl
8:  ret
    .size platter_forward, . - platter_forward

    // Forward unless `to` lies inside the source, where it would overwrite what is still unread.
    .balign 16
    .type platter_move, @function
    .globl platter_move
platter_move:
    mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    jae platter_forward
    mov rax, rdi
2:  cmp rdx, 16
    jb 4f
    sub rdx, 16
    movups xmm0, [rsi + rdx]
    movups [rdi + rdx], xmm0
    jmp 2b
3:  dec rdx
    movzx ecx, byte ptr [rsi + rdx]
    mov [rdi + rdx], cl
4:  test rdx, rdx
    jnz 3b
    ret
    .size platter_move, . - platter_move

    // The byte is the low one of esi; pshufd spreads four copies of it to sixteen.
    .balign 16
    .type platter_fill, @function
    .globl platter_fill
platter_fill:
    mov rax, rdi
    movzx esi, sil
    imul esi, esi, 0x01010101
    movd xmm0, esi
    pshufd xmm0, xmm0, 0
2:  cmp rdx, 64
    jb 3f
    movups [rdi], xmm0
    movups [rdi + 16], xmm0
    movups [rdi + 32], xmm0
    movups [rdi + 48], xmm0
    add rdi, 64
    sub rdx, 64
    jmp 2b
3:  cmp rdx, 16
    jb 5f
    movups [rdi], xmm0
    add rdi, 16
    sub rdx, 16
    jmp 3b
4:  mov [rdi], sil
    inc rdi
    dec rdx
5:  test rdx, rdx
    jnz 4b
    ret
    .size platter_fill, . - platter_fill

    // Eight bytes a turn; the first difference, read as a big number, gives the sign.
    .balign 16
    .type platter_compare, @function
    .globl platter_compare
platter_compare:
2:  cmp rdx, 8
    jb 5f
    mov rax, [rdi]
    mov rcx, [rsi]
    cmp rax, rcx
    jne 3f
    add rdi, 8
    add rsi, 8
    sub rdx, 8
    jmp 2b
3:  bswap rax
    bswap rcx
    cmp rax, rcx
    sbb eax, eax
    or eax, 1
    ret
4:  movzx eax, byte ptr [rdi]
    movzx ecx, byte ptr [rsi]
    inc rdi
    inc rsi
    dec rdx
    sub eax, ecx
    jnz 6f
5:  test rdx, rdx
    jnz 4b
    xor eax, eax
6:  ret
    .size platter_compare, . - platter_compare
"#
);

// The names that compiled code calls. Under test the host's C library has them already.
#[cfg(not(test))]
global_asm!(
    r#"
    .globl memcpy
    .set memcpy, platter_forward
    .globl memmove
    .set memmove, platter_move
    .globl memset
    .set memset, platter_fill
    .globl memcmp
    .set memcmp, platter_compare
    .globl bcmp
    .set bcmp, platter_compare
"#
);

unsafe extern "C" {
    fn platter_forward(to: *mut u8, from: *const u8, len_bytes: usize) -> *mut u8;
    fn platter_fill(to: *mut u8, byte: i32, len_bytes: usize) -> *mut u8;
    fn platter_move(to: *mut u8, from: *const u8, len_bytes: usize) -> *mut u8;
    #[cfg(test)]
    fn platter_compare(a: *const u8, b: *const u8, len_bytes: usize) -> i32;
}

/// Copies upwards, each byte read once. Another domain may write either side meanwhile.
///
/// # Safety
/// Both ranges are mapped, `to` is writable and no Rust reference to it lives elsewhere; `to`
/// does not start inside `from`'s range.
pub(crate) unsafe fn forward(to: *mut u8, from: *const u8, len_bytes: usize) {
    // SAFETY: the caller vouches for both ranges; the routine touches nothing else.
    unsafe { platter_forward(to, from, len_bytes) };
}

/// Copies between ranges that may overlap.
///
/// # Safety
/// Both ranges are mapped, `to` is writable, and no Rust reference to it lives elsewhere.
pub(crate) unsafe fn overlapping(to: *mut u8, from: *const u8, len_bytes: usize) {
    // SAFETY: the caller vouches for both ranges.
    unsafe { platter_move(to, from, len_bytes) };
}

/// Sets a range to zero.
///
/// # Safety
/// The range is mapped and writable, and no Rust reference to it lives elsewhere.
pub(crate) unsafe fn zero(to: *mut u8, len_bytes: usize) {
    // SAFETY: the caller vouches for the range.
    unsafe { platter_fill(to, 0, len_bytes) };
}

/// What they would miss: alignment penalties, and anything about speed.
#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: core::ops::Range<usize> = 0..200;

    fn pattern(seed: usize) -> [u8; 512] {
        core::array::from_fn(|i| (i * 7 + seed * 13 + i / 3) as u8)
    }

    #[test]
    fn forward_copies_every_length_and_nothing_beyond() {
        for len in LENGTHS {
            let from = pattern(1);
            let mut to = pattern(2);
            let mut want = to;
            want[5..5 + len].copy_from_slice(&from[3..3 + len]);
            // SAFETY: both ranges lie inside their arrays.
            unsafe { forward(to.as_mut_ptr().add(5), from.as_ptr().add(3), len) };
            assert_eq!(to, want, "length {len}");
        }
    }

    #[test]
    fn move_is_right_for_every_overlap() {
        for len in LENGTHS {
            for shift in 0..80 {
                for (to, from) in [(shift, 40), (40, shift)] {
                    let mut bytes = pattern(3);
                    let mut want = bytes;
                    want.copy_within(from..from + len, to);
                    let base = bytes.as_mut_ptr();
                    // SAFETY: both ranges lie inside the array.
                    unsafe { overlapping(base.add(to), base.add(from), len) };
                    assert_eq!(bytes, want, "{len} bytes from {from} to {to}");
                }
            }
        }
    }

    #[test]
    fn fill_sets_every_length_and_nothing_beyond() {
        for len in LENGTHS {
            let mut bytes = pattern(4);
            let mut want = bytes;
            want[9..9 + len].fill(0xa5);
            // SAFETY: the range lies inside the array.
            unsafe { platter_fill(bytes.as_mut_ptr().add(9), 0x7fa5, len) };
            assert_eq!(bytes, want, "length {len}");
        }
    }

    #[test]
    fn compare_orders_as_slices_do() {
        for len in 0..40 {
            for at in 0..len {
                for change in [1u8, 0x80, 0xff] {
                    let a = pattern(5);
                    let mut b = a;
                    b[at] = b[at].wrapping_add(change);
                    b[len] = !b[len];
                    // SAFETY: both ranges lie inside their arrays.
                    let got = unsafe { platter_compare(a.as_ptr(), b.as_ptr(), len) };
                    assert_eq!(got.signum(), a[..len].cmp(&b[..len]) as i32, "{len}, {at}");
                }
            }
            let a = pattern(6);
            // SAFETY: as above.
            assert_eq!(unsafe { platter_compare(a.as_ptr(), a.as_ptr(), len) }, 0);
        }
    }
}
