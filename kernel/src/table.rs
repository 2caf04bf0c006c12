//! A table of fixed size with numbered places: every request, operation and job lives in one.
//! It never grows; when it is full the caller leaves the work where it is (back-pressure).

use alloc::vec::Vec;

/// A place in a [`Table`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Id(pub u16);

pub struct Table<T> {
    places: Vec<Option<T>>,
    free: Vec<u16>,
}

impl<T> Table<T> {
    /// A table of `size` places, at most 65,535.
    pub fn new(size: usize) -> Table<T> {
        assert!(size <= u16::MAX as usize);
        let mut places = Vec::with_capacity(size);
        places.resize_with(size, || None);
        Table { places, free: (0..size as u16).rev().collect() }
    }

    /// Puts `value` in a free place, or gives it back when there is none.
    pub fn insert(&mut self, value: T) -> Result<Id, T> {
        let Some(index) = self.free.pop() else { return Err(value) };
        self.places[index as usize] = Some(value);
        Ok(Id(index))
    }

    /// Takes the value out; `None` when the place is empty or no place.
    pub fn take(&mut self, id: Id) -> Option<T> {
        let value = self.places.get_mut(id.0 as usize)?.take()?;
        self.free.push(id.0);
        Some(value)
    }

    /// The value of a place that the caller knows to be taken.
    pub fn get(&mut self, id: Id) -> &mut T {
        self.places[id.0 as usize].as_mut().expect("a place in use")
    }

    /// The value of a place, if it is in use.
    pub fn find(&mut self, id: Id) -> Option<&mut T> {
        self.places.get_mut(id.0 as usize)?.as_mut()
    }

    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Places that are free.
    pub fn left(&self) -> usize {
        self.free.len()
    }

    /// Places in use.
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.places.iter_mut().filter_map(Option::as_mut)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.places.iter().enumerate().filter_map(|(i, p)| Some((Id(i as u16), p.as_ref()?)))
    }
}

/// Would miss: that callers handle a full table; the simulator's flood scenarios do that.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_gives_the_value_back_and_places_are_used_again() {
        let mut table = Table::new(2);
        let a = table.insert('a').unwrap();
        let b = table.insert('b').unwrap();
        assert_eq!(table.insert('c'), Err('c'));
        assert_eq!(table.take(a), Some('a'));
        assert_eq!(table.take(a), None);
        assert_eq!(table.insert('d'), Ok(a));
        assert_eq!(*table.get(b), 'b');
        assert_eq!((table.len(), table.is_full()), (2, true));
    }
}
