package observe

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"runtime"
	"testing"

	"github.com/ringside-rdma/ringside/internal/softnic/wire"
)

// newRing is a ring in memory that is aligned as a mapping is.
func newRing(t testing.TB) (mem []byte, p *Producer, c *Consumer) {
	t.Helper()
	words := make([]uint64, RingFile(0)/8)
	mem = bytesOf(words)
	p, err := NewProducer(mem)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = NewConsumer(mem); err != nil {
		t.Fatal(err)
	}
	return mem, p, c
}

func example(n int) *Record {
	return &Record{Time: 1e18 + int64(n), Out: n%2 == 0, Path: UDP, Again: wire.SequenceNAK, Verdict: Early, Marked: n%3 == 0, QPN: 5, PeerQPN: maxQPN, Length: n + 10,
		Src: netip.MustParseAddrPort("10.0.0.1:4791"), Dst: netip.MustParseAddrPort("10.0.0.2:50000")}
}

// What a NIC puts in comes out, in order and whole, around the end of the ring many times; what there is no room for is counted.
func TestRing(t *testing.T) {
	_, p, c := newRing(t)
	r := rand.New(rand.NewPCG(1, 2))
	var sent, got []Record
	lost := uint64(0)
	for range 3000 {
		for range r.IntN(40) {
			n := r.IntN(5000)
			k := example(n)
			if b := p.Begin(k, n); b == nil {
				lost++
			} else {
				for i := range b {
					b[i] = byte(n + i)
				}
				p.Commit()
				k.Data = bytes.Clone(b)
				sent = append(sent, *k)
			}
		}
		for range r.IntN(60) {
			var k Record
			ok, err := c.Next(&k)
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			k.Data = bytes.Clone(k.Data)
			got = append(got, k)
		}
	}
	if len(got) < 10000 || lost == 0 || c.Lost() != lost {
		t.Fatalf("%d packets came, %d of %d were lost", len(got), c.Lost(), lost)
	}
	for i := range got {
		if !reflect.DeepEqual(got[i], sent[i]) {
			t.Fatalf("packet %d: %+v, want %+v", i, got[i], sent[i])
		}
	}
	k := example(100)
	if n := testing.AllocsPerRun(100, func() {
		if p.Begin(k, 100) != nil {
			p.Commit()
		}
		c.Next(k)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Both sides at once: under the race detector this checks the order of stores.
func TestRingConcurrent(t *testing.T) {
	_, p, c := newRing(t)
	const count = 20000
	go func() {
		for i := 0; i < count; {
			n := 8 + i%1000
			if b := p.Begin(example(n), n); b != nil {
				binary.LittleEndian.PutUint64(b, uint64(i))
				p.Commit()
				i++
			} else {
				runtime.Gosched()
			}
		}
	}()
	var k Record
	for i := 0; i < count; {
		ok, err := c.Next(&k)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			runtime.Gosched()
			continue
		}
		if n := binary.LittleEndian.Uint64(k.Data); n != uint64(i) || len(k.Data) != 8+i%1000 {
			t.Fatalf("packet %d of %d bytes, want %d", n, len(k.Data), i)
		}
		i++
	}
}

// An observer that claims to have read what was not written, or less than before, gets nothing, and the NIC goes on.
func TestRingLyingObserver(t *testing.T) {
	mem, p, _ := newRing(t)
	for _, lie := range []uint64{1 << 63, ^uint64(0), MinRing + 8, 1} {
		headerOf(mem).tail.Store(lie)
		for range 3 * MinRing / 4096 {
			if b := p.Begin(example(4000), 4000); b != nil {
				p.Commit()
			}
		}
	}
	if p.lost == 0 {
		t.Error("nothing was lost")
	}
	_, p, _ = newRing(t)
	for p.Begin(example(4000), 4000) != nil {
		p.Commit()
	}
	p.h.tail.Store(p.head + 8)
	if p.Begin(example(4000), 4000) != nil {
		t.Error("there is room where nothing was read")
	}
}

// A ring that is nothing but filling has no record in it, however often it is said to have been filled.
func TestRingOfFilling(t *testing.T) {
	mem, p, c := newRing(t)
	p.data[4] = recordPad
	headerOf(mem).head.Store(MinRing)
	if ok, err := c.Next(new(Record)); ok || err == nil {
		t.Errorf("%v, %v", ok, err)
	}
}

func TestRingSizes(t *testing.T) {
	for _, n := range []int{0, headerLen, headerLen + MinRing/2, headerLen + MinRing + 8, RingFile(0) - 1} {
		mem := bytesOf(make([]uint64, n/8+1))[:n]
		if _, err := NewProducer(mem); err == nil {
			t.Errorf("a ring of %d bytes was taken by the NIC", n)
		}
		if _, err := NewConsumer(mem); err == nil {
			t.Errorf("a ring of %d bytes was taken by the observer", n)
		}
	}
	if n := RingFile(MaxRing + 1); n != headerLen+MaxRing {
		t.Errorf("a file of %d bytes", n)
	}
}

// Whatever a NIC writes to the ring, the observer neither fails nor reads on for ever, and what it accepts can be shown.
func FuzzConsumer(f *testing.F) {
	_, p, _ := newRing(f)
	for _, n := range []int{0, 12, 100} {
		k := example(n)
		k.put(p.data[:recordSize(n)], n)
		f.Add(uint64(recordSize(n)), p.data[:recordSize(n)])
	}
	f.Add(uint64(MinRing), []byte{0, 0, 0, 0, recordPad})
	f.Add(uint64(1<<40), []byte{80, 0, 0, 0, recordPacket})
	f.Fuzz(func(t *testing.T, head uint64, data []byte) {
		mem, _, c := newRing(t)
		copy(mem[headerLen:], data)
		headerOf(mem).head.Store(head)
		var k Record
		var x Renderer
		for i := 0; ; i++ {
			ok, err := c.Next(&k)
			if err != nil || !ok {
				break
			}
			if i > MinRing/RecordLen {
				t.Fatal("more records than there is room for")
			}
			ip, length, comment := x.Render(&k)
			if len(ip) > length {
				t.Fatalf("%d of %d bytes", len(ip), length)
			}
			Line(&k, "", comment)
			(&Filter{QPNs: []uint32{1}}).Wants(&k)
		}
	})
}
