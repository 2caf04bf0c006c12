//! CRC-32C (Castagnoli), with which VHDX guards headers, tables and log entries ([MS-VHDX] 2.2).

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
}

/// A sum over bytes that come in pieces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Crc(u32);

impl Crc {
    pub fn new() -> Crc {
        Crc(u32::MAX)
    }

    #[must_use]
    pub fn with(self, bytes: &[u8]) -> Crc {
        let next = |crc: u32, &b: &u8| TABLE[((crc ^ b as u32) & 0xff) as usize] ^ (crc >> 8);
        Crc(bytes.iter().fold(self.0, next))
    }

    /// Like `with`, four bytes at `at` taken as zeros: where the sum itself stands.
    #[must_use]
    pub fn with_hole(self, bytes: &[u8], at: usize) -> Crc {
        self.with(&bytes[..at]).with(&[0; 4]).with(&bytes[at + 4..])
    }

    pub fn value(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    //! Would miss: nothing of CRC-32C itself; where it is applied is tested with its users.

    use super::*;

    /// The check value of CRC-32C in the catalogue of parametrised CRC algorithms.
    #[test]
    fn the_check_value_holds_in_any_pieces() {
        assert_eq!(Crc::new().with(b"123456789").value(), 0xe306_9283);
        assert_eq!(Crc::new().with(b"1234").with(b"56789").value(), 0xe306_9283);
        let holed = Crc::new().with_hole(b"1234xxxx9", 4).value();
        assert_eq!(holed, Crc::new().with(b"1234\0\0\0\x009").value());
    }
}
