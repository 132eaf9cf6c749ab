package softnic

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestFaultsText(t *testing.T) {
	f, err := faultsOf("loss=1%,duplicate=0.5%,reorder=100%,seed=7")
	if err != nil || f.loss != 0.01 || f.duplicate != 0.005 || f.reorder != 1 {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err := faultsOf(""); f != nil || err != nil {
		t.Errorf("nothing: %+v, %v", f, err)
	}
	for text, want := range map[string]string{
		"loss=1": `loss="1"`, "loss=-1%": `loss="-1%"`, "loss=101%": "percentage", "loss=NaN%": "percentage", "delay=1%": `"delay"`, "seed=x": `seed "x"`, "loss": "percentage", ",": `""`,
	} {
		if _, err := faultsOf(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// Packets come as often as the probabilities say, whole, and those that are held back come in the end. The same seed does the same.
func TestFaults(t *testing.T) {
	const n = 20000
	run := func() (order []ib.PSN) {
		f, err := faultsOf("loss=10%,duplicate=5%,reorder=20%,seed=3")
		if err != nil {
			t.Fatal(err)
		}
		to := func(src netip.AddrPort, p *roce.Packet) {
			if want := bytes.Repeat([]byte{byte(p.PSN)}, int(p.PSN%50)); !bytes.Equal(p.Payload, want) || src.Port() != uint16(p.PSN) {
				t.Fatalf("packet %d from %v has the bytes % x", p.PSN, src, p.Payload)
			}
			order = append(order, p.PSN)
		}
		for i := range ib.PSN(n) {
			payload := bytes.Repeat([]byte{byte(i)}, int(i%50))
			p := roce.Packet{Opcode: roce.Op(roce.RC, roce.SendOnly), PSN: i}
			came := make([]byte, roce.BTHLen, roce.BTHLen+len(payload))
			p.PutHeader(came, len(payload))
			came = append(came, payload...)
			p.Payload = came[roce.BTHLen:]
			f.pass(netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(i)), &p, came, to)
			clear(came) // the buffer is the next packet's
		}
		f.late(true, to)
		if len(f.held) != 0 {
			t.Errorf("%d packets never came", len(f.held))
		}
		return order
	}
	order := run()
	count := map[ib.PSN]int{}
	late := 0
	top := ib.PSN(0)
	for _, p := range order {
		count[p]++
		if p < top {
			late++
		}
		top = max(top, p)
	}
	twice := 0
	for _, k := range count {
		if k == 2 {
			twice++
		}
	}
	within := func(what string, got int, p float64) {
		if f := float64(got) / n; f < 0.9*p || f > 1.1*p {
			t.Errorf("%s: %d of %d", what, got, n)
		}
	}
	within("lost", n-len(count), 0.1)
	within("twice", twice, 0.7*0.05)
	within("late", late, 0.2)
	again := run()
	if len(again) != len(order) {
		t.Fatal("the same seed does something else")
	}
	for i := range order {
		if order[i] != again[i] {
			t.Fatal("the same seed does something else")
		}
	}
	f, _ := faultsOf("loss=100%")
	heard := false
	f.pass(netip.AddrPort{}, &roce.Packet{Opcode: roce.Op(roce.RC, roce.Acknowledge), Syndrome: roce.NakAccess}, nil, func(netip.AddrPort, *roce.Packet) { heard = true })
	if !heard {
		t.Error("a refusal is lost")
	}
}
