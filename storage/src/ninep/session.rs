//! The life of a 9p session: Tversion, Tattach, and what a server's mistakes do to it.
//!
//! Guards that nothing but the handshake is sent before the root is attached. Tversion goes out
//! on ring `NOTAG % rings`, as any other tag would. Must never: accept a larger message size
//! than it asked for.

use platter_xen::Hypervisor;
use platter_xen::ninepfs::MessageHead;

use super::client::Client;
use super::file::ROOT_FID;
use super::message::{
    Answer, NOFID, NOTAG, PLATTER_IN_FLIGHT, QID_DIR, Request, VERSION_PLAIN, VERSION_PLATTER,
};
use crate::store::StoreFault;

/// The smallest message size we can work with: a page of data and a Twrite around it.
const MSIZE_MIN: u32 = 4096 + 24;
/// The tag of Tattach; nothing else is in flight then.
const ATTACH_TAG: u16 = 0;
/// Longest handshake message.
const HANDSHAKE_BYTES: usize = 64;

/// Where a session stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Session {
    /// No server.
    Down,
    /// Tversion with this dialect is due or in flight.
    Version {
        platter: bool,
        sent: bool,
    },
    /// Tattach is due or in flight.
    Attach {
        sent: bool,
    },
    Up,
    /// Given up, with the reason for people; the mount takes it down and tries again.
    Broken(&'static str),
}

impl Session {
    pub(super) fn is_connected(self) -> bool {
        !matches!(self, Session::Down | Session::Broken(_))
    }

    pub(super) fn waits_for_answer(self) -> bool {
        matches!(self, Session::Version { sent: true, .. } | Session::Attach { sent: true })
    }
}

impl Client {
    /// Begins a session over rings that the server has mapped.
    pub(super) fn session_start(&mut self) {
        self.lose(Session::Version { platter: true, sent: false });
        self.was_up = false;
    }

    /// Sends the handshake message that is due.
    pub(super) fn session_send<H: Hypervisor>(&mut self, hv: &mut H) {
        match self.session {
            Session::Version { platter, sent: false } => {
                let half = self.lanes[0].ring.half_bytes();
                // With many requests per ring, two of the longest should fit at once.
                self.msize = if platter { half / 2 } else { half }.max(MSIZE_MIN).min(half);
                let version = if platter { VERSION_PLATTER } else { VERSION_PLAIN };
                let request = Request::Version { msize: self.msize, version };
                if self.handshake(hv, NOTAG, &request) {
                    self.session = Session::Version { platter, sent: true };
                }
            }
            Session::Attach { sent: false } => {
                // The names do not matter: the server acts as the user it runs as.
                let (uname, aname) = ("root", "");
                let request =
                    Request::Attach { fid: ROOT_FID, afid: NOFID, uname, aname, n_uname: 0 };
                if self.handshake(hv, ATTACH_TAG, &request) {
                    self.session = Session::Attach { sent: true };
                }
            }
            _ => {}
        }
    }

    fn handshake<H: Hypervisor>(&mut self, hv: &mut H, tag: u16, request: &Request<'_>) -> bool {
        let mut bytes = [0; HANDSHAKE_BYTES];
        let len = request.emit(tag, &mut bytes).expect("handshake messages are short");
        let rings = self.lanes.len();
        let ring = &mut self.lanes[usize::from(tag) % rings].ring;
        match ring.reserve(hv, len as u32) {
            Ok(Some(reservation)) => {
                ring.put(hv, &reservation, 0, &bytes[..len]);
                ring.seal(reservation);
                true
            }
            Ok(None) => false,
            Err(_) => {
                self.lose(Session::Broken("the 9p server broke its ring"));
                false
            }
        }
    }

    /// Takes an answer before the session is up; `Err` when the server may not answer so.
    pub(super) fn session_answered(
        &mut self,
        head: MessageHead,
        answer: &Answer<'_>,
    ) -> Result<(), StoreFault> {
        match (self.session, answer) {
            (Session::Version { platter, sent: true }, _) if head.tag == NOTAG => {
                self.version_answered(platter, answer);
                Ok(())
            }
            (Session::Attach { sent: true }, Answer::Attach { qid })
                if head.tag == ATTACH_TAG && qid.kind & QID_DIR != 0 =>
            {
                self.session = Session::Up;
                self.was_up = true;
                self.reopen_files();
                Ok(())
            }
            (Session::Attach { sent: true }, Answer::Lerror { .. }) => {
                self.lose(Session::Broken("the 9p server refuses to attach its root"));
                Ok(())
            }
            _ => Err(StoreFault::Protocol),
        }
    }

    fn version_answered(&mut self, platter: bool, answer: &Answer<'_>) {
        let (msize, dialect) = match answer {
            Answer::Version { msize, version } if platter && *version == VERSION_PLATTER => {
                (*msize, true)
            }
            Answer::Version { msize, version } if *version == VERSION_PLAIN => (*msize, false),
            _ if platter => {
                self.session = Session::Version { platter: false, sent: false };
                return;
            }
            _ => {
                self.lose(Session::Broken("the 9p server does not speak 9P2000.L"));
                return;
            }
        };
        if !(MSIZE_MIN..=self.msize).contains(&msize) {
            self.lose(Session::Broken("the 9p server wants an unusable message size"));
            return;
        }
        self.msize = msize;
        self.extended = dialect;
        self.depth = if dialect { PLATTER_IN_FLIGHT } else { 1 };
        self.session = Session::Attach { sent: false };
    }
}
