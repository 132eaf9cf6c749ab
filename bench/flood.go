package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The rate of SENDs while the receiver is flooded with packets that it has no use for, from the sender's host. The flooder takes
// processor time, on its own and in the kernel, wherever its packets go: what the receiving NIC pays shows against the same packets sent to
// a socket beside it that nobody reads.

// floodRate is how many packets a second there are, besides those that are measured.
const floodRate = 100_000

// A flood is what is sent.
type flood struct{ kind, what string }

const (
	floodNone = "none"
	floodSink = "elsewhere"
)

var floods = []flood{
	{floodNone, "nothing"},
	{floodSink, "to a socket beside it (the control)"},
	{"stranger", "from an address that is not the peer's"},
	{"qpn", "to a queue pair that does not exist"},
	{"icrc", "with a wrong invariant CRC"},
	{"psn", "of long ago: a PSN that was executed before; each asks for an acknowledgement"},
	{"probe", "probes of the path, which are answered"},
}

func (f flood) name() string { return "ringside send rate 64 B, flood: " + f.kind }

// netFlood is one run of `ringside perf` whose server is flooded once its queue pair is there.
type netFlood struct {
	kind string
	iter int
}

func (f netFlood) run(c *config) (values, error) {
	var flooded floodResult
	out, _, err := netPerf{"send", "rate", 64, f.iter, "udp", ""}.beside(c, func() (func() error, error) {
		if f.kind == floodNone {
			return func() error { return nil }, nil
		}
		return startFlood(c, f.kind, &flooded)
	})
	if err != nil {
		return nil, err
	}
	v, err := parsePerf(out, "udp")
	if err == nil && f.kind != floodNone {
		v["flood"] = float64(flooded.Packets) / flooded.Seconds
	}
	return v, err
}

// startFlood finds out what the flooder needs to know, as somebody who listens on the way could, and starts it. end ends it.
func startFlood(c *config, kind string, flooded *floodResult) (end func() error, err error) {
	a := floodArgs{Kind: kind, From: network.client, Rate: floodRate}
	if a.To, a.QPN, err = serverQP(c); err != nil {
		return nil, err
	}
	var stops []func()
	switch kind {
	case "stranger":
		a.From = network.stranger
	case "psn":
		if a.PSN, err = serverPSN(c, a.QPN); err != nil {
			return nil, err
		}
	case floodSink:
		sink, err := start("sink-server", struct{}{})
		if err != nil {
			return nil, err
		}
		stops = append(stops, sink.stop)
		if err := sink.expect("addr", &a.To, 10*time.Second); err != nil {
			sink.stop()
			return nil, err
		}
	}
	p, err := start("flooder", a)
	if err != nil {
		return nil, err
	}
	stops = append(stops, p.stop)
	return func() error {
		defer func() {
			for _, stop := range stops {
				stop()
			}
		}()
		if err := p.tell("stop"); err != nil {
			return err
		}
		return p.expect("flooded", flooded, 10*time.Second)
	}, nil
}

// serverQP returns where the server's queue pair is, once it is connected.
func serverQP(c *config) (at string, qpn uint32, err error) {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		out, err := elsewhere(true, c.ringside, "stats", "-o", "json").Output()
		if err != nil {
			return "", 0, fmt.Errorf("ringside stats: %w", err)
		}
		var report struct {
			NICs []struct {
				Ports []struct {
					Address string `json:"address"`
				} `json:"ports"`
				QPs []struct {
					QPN   uint32 `json:"qpn"`
					State string `json:"state"`
					Path  string `json:"path"`
				} `json:"qps"`
			} `json:"nics"`
		}
		if err := json.Unmarshal(out, &report); err != nil {
			return "", 0, fmt.Errorf("ringside stats: %w", err)
		}
		for _, n := range report.NICs {
			for _, q := range n.QPs {
				if q.Path == "udp" && q.State == "RTS" && len(n.Ports) == 1 {
					return n.Ports[0].Address, q.QPN, nil
				}
			}
		}
	}
	return "", 0, errors.New("the server has no connected queue pair")
}

var psnLine = regexp.MustCompile(`SEND.*QP (\d+) PSN (\d+)`)

// serverPSN returns the PSN of a packet that the queue pair has received.
func serverPSN(c *config, qpn uint32) (uint32, error) {
	out, err := elsewhere(true, c.ringside, "capture", "-c", "1", "--opcode", "send", "--qp", fmt.Sprint(qpn)).Output()
	if err != nil {
		return 0, fmt.Errorf("ringside capture: %w", err)
	}
	m := psnLine.FindStringSubmatch(strings.ToUpper(string(out)))
	if m == nil {
		return 0, fmt.Errorf("ringside capture says %q", out)
	}
	n, err := strconv.ParseUint(m[2], 10, 24)
	return uint32(n), err
}

// floodArgs are what a flooder is told.
type floodArgs struct {
	Kind, From string
	To         string // address and UDP port
	QPN, PSN   uint32
	Rate       int
}

// floodResult is what it says when it was stopped.
type floodResult struct {
	Packets int
	Seconds float64
}

// packet makes the datagram.
func (a *floodArgs) packet(from, to netip.AddrPort) ([]byte, error) {
	const payload = 64
	p := roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: a.QPN, PSN: ib.PSN(a.PSN), AckReq: true}
	switch a.Kind {
	case "stranger", "icrc", floodSink:
	case "psn":
		p.PSN = p.PSN.Add(-1000)
	case "qpn":
		p.DestQP ^= 0x555555
	case "probe":
		p = roce.Packet{Opcode: roce.Probe, PKey: roce.DefaultPKey, DestQP: a.QPN}
	default:
		return nil, fmt.Errorf("no flood %q", a.Kind)
	}
	b := make([]byte, p.Opcode.HeaderLen()+payload)
	p.PutHeader(b, payload)
	var crc roce.ICRC
	crc.Init(from, to)
	if b = crc.Put(b); a.Kind == "icrc" {
		b[len(b)-1] ^= 0xff
	}
	return b, nil
}

// flooder sends a packet again and again until it is stopped.
func flooder(args json.RawMessage) error {
	var a floodArgs
	if err := json.Unmarshal(args, &a); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(a.To)
	if err != nil {
		return err
	}
	conn, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(a.From)}, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return err
	}
	defer conn.Close()
	pkt, err := a.packet(conn.LocalAddr().(*net.UDPAddr).AddrPort(), to)
	if err != nil {
		return err
	}
	sent := 0
	begin := time.Now()
	for {
		select {
		case <-childStdin:
			say("flooded", floodResult{sent, time.Since(begin).Seconds()})
			return nil
		default:
		}
		for due := int(time.Since(begin).Seconds() * float64(a.Rate)); sent < due; sent++ {
			if _, err := conn.Write(pkt); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				continue // refused, by ICMP: the next is not
			}
		}
		sleepThread(100 * time.Microsecond)
	}
}

// sinkServer has a socket that nobody reads.
func sinkServer(json.RawMessage) error {
	conn, err := net.ListenPacket("udp4", net.JoinHostPort(listenHost(), "0"))
	if err != nil {
		return err
	}
	defer conn.Close()
	say("addr", conn.LocalAddr().String())
	for range childStdin {
	}
	return nil
}

// floodReport is the table, against the control.
func floodReport(b *page, r *results) {
	b.line("\n| 64 B SEND while the receiver gets %d packets a second besides | messages/s | of the control | packets a second sent |\n|---|---|---|---|", floodRate)
	for _, f := range floods {
		ratio := r.ratio(ref{name: f.name(), metric: "rate"}, ref{name: flood{kind: floodSink}.name(), metric: "rate"}).ratio
		b.line("| %s | %s | %s | %s |", f.what, r.series(f.name(), "rate", 1), number(ratio), r.series(f.name(), "flood", 1))
	}
}

// beside is run, with something that runs meanwhile; it returns what the client has written.
func (p netPerf) beside(c *config, other func() (end func() error, err error)) (out []byte, cpu time.Duration, err error) {
	server := elsewhere(true, c.ringside, "perf", "server", "--listen", fmt.Sprint(network.server, ":", netService), "--once")
	client := exec.Command(c.ringside, "perf", p.op, p.kind, fmt.Sprint(network.server, ":", netService), "--path", p.path, "-o", "json",
		"--iters", strconv.Itoa(p.iter), "--size", strconv.Itoa(p.size))
	server.Env = append(os.Environ(), "RINGSIDE_PATH="+p.path, "RINGSIDE_SOFT_FAULTS="+p.faults)
	client.Env = server.Env
	return clientAndServer(client, server, other)
}
