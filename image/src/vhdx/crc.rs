//! CRC-32C (Castagnoli), with which VHDX guards headers, tables and log entries ([MS-VHDX] 2.2).

/// Table `n` is what a byte does to the sum `n` bytes later: eight at a time are summed with them.
const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][n] = crc;
        n += 1;
    }
    let mut later = 1;
    while later < 8 {
        let mut n = 0;
        while n < 256 {
            let crc = tables[later - 1][n];
            tables[later][n] = crc >> 8 ^ tables[0][(crc & 0xff) as usize];
            n += 1;
        }
        later += 1;
    }
    tables
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
        let (eights, rest) = bytes.as_chunks::<8>();
        let crc = eights.iter().fold(self.0, |crc, eight| {
            let word = u64::from_le_bytes(*eight) ^ u64::from(crc);
            let bytes = word.to_le_bytes().into_iter().zip(TABLES.iter().rev());
            bytes.fold(0, |sum, (byte, table)| sum ^ table[usize::from(byte)])
        });
        let next = |crc: u32, &b: &u8| TABLES[0][((crc ^ b as u32) & 0xff) as usize] ^ (crc >> 8);
        Crc(rest.iter().fold(crc, next))
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
        let long = [b"12345678".as_slice(), &[9; 35]].concat();
        let one = long.iter().fold(Crc::new(), |crc, byte| crc.with(&[*byte]));
        assert_eq!(Crc::new().with(&long), one);
        let holed = Crc::new().with_hole(b"1234xxxx9", 4).value();
        assert_eq!(holed, Crc::new().with(b"1234\0\0\0\x009").value());
    }
}
