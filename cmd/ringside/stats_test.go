package main

import (
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What a connection and a port are shown as.
func TestStatsText(t *testing.T) {
	w := observe.Wire{Sent: 10, Resent: 3, Again: map[string]uint64{"timeout": 1, "sequence NAK": 2}, Timeouts: 1, SeqNAKs: 2, RNRNAKs: 4, Useless: 5,
		Received: 20, Duplicates: 6, Early: 7, NotReady: 8, Refused: 2, Dropped: 9, RefusedBy: map[string]uint64{observe.RefusedAccess: 1, observe.RefusedInvalid: 1}}
	n := &observe.NIC{Device: "soft0", GID: "fd00::1", PID: 7, Program: "p", Ports: []observe.Port{{Address: "10.0.0.1:4791", Sent: 1, Received: 2, NotSent: 3,
		Refusal: "network is unreachable", Dropped: map[string]uint64{"icrc": 4}, Conns: 1, Total: w},
		{Path: "tcp", Sent: 8, Received: 9, Ended: map[string]uint64{observe.EndedLost: 1, observe.EndedByPeer: 2}, Refusal: "timed out", Total: observe.Wire{Sent: 4, Received: 5}}}}
	var b strings.Builder
	writeNIC(&b, n)
	const want = `soft0/7  p, GID fd00::1
    UDP 10.0.0.1:4791: 1 packets sent, 2 received, 3 not sent (network is unreachable); dropped: icrc 4
    1 connections, and those that have ended: 10 request packets sent, 3 of them again (sequence NAK 2, timeout 1); 1 timeouts, 2 sequence NAKs, 4 RNR NAKs
        20 received: 6 duplicates, 7 early, 8 without a receive, 2 refused (invalid request 1, remote access error 1), 9 dropped; 5 answers said nothing new
    TCP: 8 packets sent, 9 received; ended: by the peer 2, lost 1 (timed out); dropped: none
    0 connections, and those that have ended: 4 request packets sent, 0 of them again (none); 0 timeouts, 0 sequence NAKs, 0 RNR NAKs
        5 received: 0 duplicates, 0 early, 0 without a receive, 0 refused (none), 0 dropped; 0 answers said nothing new

`
	if b.String() != want {
		t.Errorf("%s\nwant\n%s", b.String(), want)
	}
}

// A NIC has to fit both --pid and --gid.
func TestSelection(t *testing.T) {
	for _, tt := range []struct {
		pids []int
		gids []string
		want string // of the NICs below
	}{
		{[]int{7}, nil, "ab"},
		{nil, []string{"fd00::1"}, "ac"},
		{[]int{7}, []string{"fd00::1"}, "a"},
		{[]int{7, 8}, []string{"fd00::1"}, "ac"},
		{[]int{7, 8}, []string{"fd00::2", "fd00::1"}, "abc"},
		{[]int{9}, []string{"fd00::1"}, ""},
	} {
		is, err := selection(tt.pids, tt.gids)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for name, n := range []*observe.Source{{PID: 7, GID: ib.GID{0: 0xfd, 15: 1}}, {PID: 7, GID: ib.GID{0: 0xfd, 15: 2}}, {PID: 8, GID: ib.GID{0: 0xfd, 15: 1}}} {
			if is(n) {
				got += string(rune('a' + name))
			}
		}
		if got != tt.want {
			t.Errorf("--pid %v --gid %v: %q, want %q", tt.pids, tt.gids, got, tt.want)
		}
	}
	if is, err := selection(nil, nil); is != nil || err != nil {
		t.Errorf("nothing asked for: %v", err)
	}
}
