//! Nodes of both ends, honest and hostile. Would miss: what real xenstored lets a guest write
//! between our two rounds of reading (each round is proved on its own, so: nothing).

use super::*;
use alloc::vec::Vec;

fn layout(values: [Option<&str>; 4]) -> Result<Layout, ConnectFault> {
    Layout::parse(values.map(|value| value.map(str::as_bytes)), 8, 4)
}

fn connect(layout: &Layout, nodes: &[(&str, &str)]) -> Result<Connect, ConnectFault> {
    let value = |key: &String| {
        nodes.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_bytes())
    };
    layout.connect(&layout.keys().iter().map(value).collect::<Vec<_>>())
}

#[test]
fn the_simplest_frontend() {
    let layout = layout([Some("x86_64-abi"), None, None, None]).unwrap();
    assert_eq!(layout.keys(), ["event-channel", "ring-ref", "ring-ref0"]);
    let wanted = connect(&layout, &[("event-channel", "15"), ("ring-ref", "8")]).unwrap();
    assert_eq!(wanted.abi, Abi::X86_64);
    assert_eq!(wanted.queues[0].grefs[..], [Gref(8)]);
    assert_eq!(wanted.queues[0].port, Port(15));
}

#[test]
fn one_page_under_either_name() {
    for order in [None, Some("0")] {
        let layout = layout([None, Some("1"), order, None]).unwrap();
        for name in ["ring-ref", "ring-ref0"] {
            let wanted = connect(&layout, &[("event-channel", "1"), (name, "8")]).unwrap();
            assert_eq!(wanted.queues[0].grefs[..], [Gref(8)]);
        }
        // After pvgrub2's single page, a kernel that numbers: the right place wins.
        let both = [("event-channel", "1"), ("ring-ref", "8"), ("ring-ref0", "9")];
        let gref = if order.is_some() { Gref(9) } else { Gref(8) };
        assert_eq!(connect(&layout, &both).unwrap().queues[0].grefs[..], [gref]);
    }
}

#[test]
fn many_queues_of_many_pages_survive_both_directions() {
    let mut queues = heapless::Vec::new();
    for queue in 0..8u32 {
        let grefs = (0..16).map(|page| Gref(queue * 16 + page)).collect();
        queues.push(Queue { grefs, port: Port(queue + 1) }).unwrap();
    }
    let wanted = Connect { abi: Abi::X86_32, queues };
    let nodes = front_nodes(&wanted);
    let nodes: Vec<_> = nodes.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    let find = |key| nodes.iter().find(|(name, _)| *name == key).map(|(_, value)| *value);
    let layout = layout(FIRST_KEYS.map(find)).unwrap();
    assert_eq!((layout.queues, layout.pages), (8, 16));
    assert!(layout.keys().contains(&"queue-7/ring-ref15".into()));
    assert_eq!(connect(&layout, &nodes), Ok(wanted));
}

#[test]
fn the_old_name_counts_pages() {
    assert_eq!(layout([None, None, None, Some("4")]).unwrap().pages, 4);
    assert_eq!(layout([None, None, None, Some("3")]), Err(ConnectFault::RingOrder));
    assert_eq!(layout([None, None, Some("1"), Some("4")]).unwrap().pages, 2);
}

#[test]
fn hostile_first_keys() {
    for protocol in ["", "x86_64", "x86_64-abi\0", "ia64-abi"] {
        assert_eq!(layout([Some(protocol), None, None, None]), Err(ConnectFault::Protocol));
    }
    for queues in ["0", "9", "-1", "", "1x", "18446744073709551617"] {
        assert_eq!(layout([None, Some(queues), None, None]), Err(ConnectFault::Queues));
    }
    for order in ["5", "63", "64", "4294967296", "-1", ""] {
        assert_eq!(layout([None, None, Some(order), None]), Err(ConnectFault::RingOrder));
    }
    for pages in ["0", "32", "18446744073709551615"] {
        assert_eq!(layout([None, None, None, Some(pages)]), Err(ConnectFault::RingOrder));
    }
    let single = Layout::parse([None, None, Some(b"1"), None], 1, 0);
    assert_eq!(single, Err(ConnectFault::RingOrder), "more than was offered");
}

#[test]
fn hostile_second_keys() {
    let layout = layout([None, None, None, None]).unwrap();
    let faults = [
        (Some("1"), None, ConnectFault::RingRef),
        (Some("1"), Some(""), ConnectFault::RingRef),
        (Some("1"), Some("4294967296"), ConnectFault::RingRef),
        (Some("1"), Some("-8"), ConnectFault::RingRef),
        (None, Some("8"), ConnectFault::EventChannel),
        (Some("0"), Some("8"), ConnectFault::EventChannel),
        (Some("15 "), Some("8"), ConnectFault::EventChannel),
    ];
    for (port, gref, fault) in faults {
        assert_eq!(layout.connect(&[port, gref, None]), Err(fault));
    }
}

#[test]
fn disk_nodes_survive_both_directions() {
    let full = DiskNodes {
        sectors: 1 << 40,
        sector_bytes: 512,
        physical_sector_bytes: 4096,
        info: 4,
        flush: true,
        barrier: true,
        discard_alignment_bytes: 512,
        discard_granularity_bytes: Some(65536),
        indirect_segments_max: 256,
        queues_max: 4,
        ring_page_order_max: 4,
    };
    let bare = DiskNodes {
        physical_sector_bytes: 512,
        flush: false,
        barrier: false,
        discard_alignment_bytes: 0,
        discard_granularity_bytes: None,
        indirect_segments_max: 0,
        queues_max: 1,
        ring_page_order_max: 0,
        ..full
    };
    assert_eq!(bare.nodes().len(), 3, "each node counts against the quota");
    for disk in [full, bare] {
        let nodes = disk.nodes();
        let values = BACK_KEYS
            .map(|key| nodes.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone()));
        assert_eq!(DiskNodes::parse(&values), Ok(disk));
    }
    let mut values = [None; 12];
    assert_eq!(DiskNodes::parse::<&str>(&values), Err(BackFault::SectorSize));
    values[1] = Some("1000");
    assert_eq!(DiskNodes::parse(&values), Err(BackFault::SectorSize));
    values[1] = Some("512");
    assert_eq!(DiskNodes::parse(&values), Err(BackFault::Sectors));
    values[0] = Some("8");
    assert_eq!(DiskNodes::parse(&values), Err(BackFault::Info));
}
