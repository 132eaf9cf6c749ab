package observe

import (
	"encoding/json"
	"fmt"
)

// A NIC is a software NIC's counters at one moment, as they are passed on: in JSON, since the observer may be of another version, to
// which fields may be unknown. They are no snapshot: each queue pair is looked at by itself.
type NIC struct {
	Device  string `json:"device"`
	GID     string `json:"gid"`
	PID     int    `json:"pid"` // filled in by the observer, from what the kernel says; 0: it does not say
	Program string `json:"program"`
	Ports   []Port `json:"ports"` // addresses of the host that the NIC uses, and TCP if it does
	QPs     []QP   `json:"qps"`   // by QPN
}

// A Port is one UDP socket, or all the queue pairs together that are connected by a TCP connection of their own.
type Port struct {
	Path     string            `json:"path"`        // "udp", "tcp"; empty: "udp"
	Address  string            `json:"address"`     // empty with "tcp"
	Sent     uint64            `json:"sent"`        // packets
	Received uint64            `json:"received"`    // packets, those that were dropped included
	NotSent  uint64            `json:"not_sent"`    // packets that the system refused; of a stream, it takes all or gives it up
	Refusal  string            `json:"refusal"`     // why, the last time; empty: it has not
	Full     uint64            `json:"full"`        // times that the socket had no room for more
	Dropped  map[string]uint64 `json:"dropped"`     // received packets, by Verdict.Key; those that have not occurred are missing
	Ended    map[string]uint64 `json:"ended"`       // TCP connections that have ended, by how; what has not occurred is missing
	Conns    int               `json:"connections"` // RC and UC queue pairs that are connected from here
	Total    Wire              `json:"total"`       // of all that are and were
}

// The keys of Port.Ended.
const (
	EndedHere   = "here"              // the queue pair was closed or reset
	EndedByPeer = "by the peer"       // or by the peer's system
	EndedLost   = "lost"              // the system of this side has given it up: Port.Refusal says why
	EndedBroken = "protocol violated" // something came that was no packet for the queue pair
)

// A QP is a queue pair, counted since it was created or last in RESET.
type QP struct {
	QPN     uint32 `json:"qpn"`
	Type    string `json:"type"`
	State   string `json:"state"`
	Path    string `json:"path"` // "inproc", "shm", "udp", "tcp"; empty: not connected
	Peer    string `json:"peer"` // its GID or its address
	PeerQPN uint32 `json:"peer_qpn"`

	Requests    Traffic `json:"requests"` // that have completed with success
	Waiting     int     `json:"waiting"`  // requests that were posted and have not completed
	Receives    Traffic `json:"receives"` // messages whose completions were polled
	ReceiveRoom int     `json:"posted"`   // receives that are posted to a queue of the QP's own

	// RNR counts the attempts in vain of requests for which the peer had no receive posted.
	RNR uint64 `json:"rnr"`
	// Wire is there on the paths "udp" and "tcp".
	Wire *Wire `json:"wire,omitempty"`
}

// Traffic is messages and their bytes.
type Traffic struct {
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
}

// Wire is what a connection over a network has sent and met.
type Wire struct {
	Sent   uint64            `json:"sent"`   // packets of requests, all
	Resent uint64            `json:"resent"` // of those, packets that were sent again
	Again  map[string]uint64 `json:"again"`  // Resent by why (wire.Reason); what has not occurred is missing
	Single uint64            `json:"single"` // of those sent again, packets that were not followed by all that had been sent behind them
	// What has led to that:
	Timeouts uint64 `json:"timeouts"`
	SeqNAKs  uint64 `json:"sequence_naks"`
	RNRNAKs  uint64 `json:"rnr_naks"`
	Implied  uint64 `json:"implied_naks"` // responses that were missing, as later ones have shown
	// Useless counts acknowledgements and responses that said nothing new.
	Useless uint64 `json:"useless"`

	Received   uint64 `json:"received"`   // packets of requests
	Duplicates uint64 `json:"duplicates"` // of those, that were executed before
	Early      uint64 `json:"early"`      // that came before one that was missing
	NotReady   uint64 `json:"not_ready"`  // that found no receive: an RNR NAK was sent
	Refused    uint64 `json:"refused"`    // that were refused, which ends an RC connection
	Dropped    uint64 `json:"dropped"`    // that nothing could be done with

	// RefusedBy is Refused by what the peer was told (NAKs); what has not occurred is missing.
	RefusedBy map[string]uint64 `json:"refused_by"`
}

// The keys of Wire.RefusedBy: NAK codes (IBA 9.7.5.2), and what UC does instead.
const (
	RefusedInvalid   = "invalid request"
	RefusedAccess    = "remote access error"
	RefusedOperation = "remote operational error"
	RefusedSilently  = "silently"
)

// maxCounters bounds the JSON of a NIC: of all the queue pairs that one can have.
const maxCounters = 256 << 20

// EncodeNIC writes the counters.
func EncodeNIC(n *NIC) ([]byte, error) { return json.Marshal(n) }

// DecodeNIC reads what another process has written. What cannot be printed in its texts is replaced.
func DecodeNIC(b []byte) (*NIC, error) {
	n := new(NIC)
	if err := json.Unmarshal(b, n); err != nil {
		return nil, fmt.Errorf("the software NIC's counters: %w", err)
	}
	texts := []*string{&n.Device, &n.GID, &n.Program}
	clean := func(m *map[string]uint64) {
		c := make(map[string]uint64, len(*m))
		for k, v := range *m {
			c[printable([]byte(k))] += v
		}
		*m = c
	}
	for i := range n.Ports {
		p := &n.Ports[i]
		texts = append(texts, &p.Path, &p.Address, &p.Refusal)
		clean(&p.Dropped)
		clean(&p.Ended)
		clean(&p.Total.Again)
		clean(&p.Total.RefusedBy)
	}
	for i := range n.QPs {
		q := &n.QPs[i]
		texts = append(texts, &q.Type, &q.State, &q.Path, &q.Peer)
		if q.Wire != nil {
			clean(&q.Wire.Again)
			clean(&q.Wire.RefusedBy)
		}
	}
	for _, s := range texts {
		*s = printable([]byte(*s))
	}
	return n, nil
}
